"""A run killed anywhere and started again does what the uninterrupted one does: batches, logs and weights."""

import json
import random

import pytest
from killed_runs import EXAMPLES, run

from unime_st.checkpoints import checkpoints, is_complete, last_complete_checkpoint

STEPS, EVERY = 10, 2  # more than two epochs of either stage
TIMES = ("train_runtime", "train_samples_per_second", "train_steps_per_second")


def arguments_of(stage, world_of_data, teacher, start, output):
    common = [f"backbone={start}", f"output={output}", "lora.rank=4", f"training.max_steps={STEPS}"]
    common += [f"training.save_steps={EVERY}", "training.disable_tqdm=true", "training.learning_rate=1e-2"]
    recipe = ["--recipe", str(EXAMPLES / f"recipes/miniature_{stage}.yaml")]
    if stage == "stage1":
        data = [f"data.source={world_of_data / 'texts.txt'}", f"teacher.model={teacher}"]
        data += [f"teacher.cache_dir={output}/teacher", "training.per_device_train_batch_size=4"]
    else:
        data = [f"data.root={world_of_data / 'train'}", f"data.image_root={world_of_data / 'images'}"]
        data += ["loss.num_hard_negatives=1", "loss.mini_batch_size=2", "training.per_device_train_batch_size=4"]
        data += ["training.dataloader_num_workers=1", "lora.dropout=0.1"]  # dropout: the random numbers matter too
    return [*recipe, *common, *data]


def end_of(output):
    """Weights of the exported encoder, and the logs of the last checkpoint."""
    weights = {path.name: path.read_bytes() for path in (output / "encoder").rglob("*.safetensors")}
    last = last_complete_checkpoint(output / "checkpoints")
    logs = json.loads((last / "trainer_state.json").read_text())["log_history"]
    assert weights
    assert last.name == f"checkpoint-{STEPS}"
    return weights, [{key: value for key, value in entry.items() if key not in TIMES} for entry in logs]


def check_resumed(killed, resumed, through, output, expected):
    """Of a run that was killed, and of its second part."""
    assert killed.exits[0] == -9, killed.printed[-2000:]
    assert set(resumed.exits) == {0}, resumed.printed[-2000:]
    first = resumed.steps[0][0]
    assert [step for step, _ in resumed.steps] == list(range(first, STEPS))  # it went on, and did not start again
    assert resumed.steps == through.steps[first:]
    weights, logs = end_of(output)
    assert logs == expected[1]
    assert weights == expected[0]
    return first


@pytest.fixture(scope="module", params=["stage1", "stage2"])
def uninterrupted(request, world, teacher, encoder, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    script = f"train_{request.param}"
    given = (world, teacher, encoder)
    through = run(script, arguments_of(request.param, *given, folder / "through"), folder / "through-run")
    assert through.exits == [0], through.printed[-3000:]
    assert [step for step, _ in through.steps] == list(range(STEPS))
    assert len({json.dumps(rows) for _, rows in through.steps}) == STEPS  # every epoch has an order of its own
    return script, given, folder, through, end_of(folder / "through")


@pytest.mark.slow
def test_killed_at_any_step(uninterrupted):
    script, given, folder, through, expected = uninterrupted
    for step in random.Random(script).sample(range(EVERY, STEPS), 1):
        output = folder / f"step-{step}"
        command = arguments_of(script.removeprefix("train_"), *given, output)
        killed = run(script, command, folder / f"step-{step}-killed", step=step)
        assert len(killed.steps) == step
        resumed = run(script, command, folder / f"step-{step}-resumed")
        first = check_resumed(killed, resumed, through, output, expected)
        assert first == step - step % EVERY
        assert f"checkpoint-{first}; give another output=" in resumed.printed


@pytest.mark.slow
def test_killed_while_a_checkpoint_is_written_or_removed(uninterrupted):
    script, given, folder, through, expected = uninterrupted
    a_checkpoint = through.changes // (STEPS // EVERY)
    assert a_checkpoint > 10
    torn = 0
    for change in random.Random(script).sample(range(a_checkpoint, through.changes - 1), 2):
        output = folder / f"change-{change}"
        command = arguments_of(script.removeprefix("train_"), *given, output)
        killed = run(script, command, folder / f"change-{change}-killed", change=change)
        left = checkpoints(output / "checkpoints")
        torn += not all(map(is_complete, left))
        whole = last_complete_checkpoint(output / "checkpoints")
        assert whole is not None, f"nothing whole is left among {left}"
        resumed = run(script, command, folder / f"change-{change}-resumed")
        first = check_resumed(killed, resumed, through, output, expected)
        assert whole.name == f"checkpoint-{first}"
        assert len(killed.steps) - first <= EVERY
        assert first >= EVERY
    assert torn, "hardly any kill met a checkpoint half-written"
