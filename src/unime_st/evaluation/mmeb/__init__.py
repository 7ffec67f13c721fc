"""MMEB: ``evaluator`` is the entry point, ``tasks`` lists and reads the tasks, ``inputs`` collects their inputs."""
