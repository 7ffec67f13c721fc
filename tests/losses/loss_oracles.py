"""The losses in plain Python floats, value and gradient, written from the definitions and sharing no code with src."""

import math

Matrix = list[list[float]]


def cosine_and_gradients(a: list[float], b: list[float]) -> tuple[float, list[float], list[float]]:
    norm_a, norm_b = math.sqrt(sum(x * x for x in a)), math.sqrt(sum(x * x for x in b))
    cosine = sum(x * y for x, y in zip(a, b, strict=True)) / (norm_a * norm_b)
    to_a = [(y / norm_b - cosine * x / norm_a) / norm_a for x, y in zip(a, b, strict=True)]
    to_b = [(x / norm_a - cosine * y / norm_b) / norm_b for x, y in zip(a, b, strict=True)]
    return cosine, to_a, to_b


def add_scaled(target: list[float], scale: float, direction: list[float]) -> None:
    for i, x in enumerate(direction):
        target[i] += scale * x


def softmax(values: list[float]) -> list[float]:
    top = max(values)
    weights = [math.exp(v - top) for v in values]
    return [w / sum(weights) for w in weights]


def chosen_negatives(row, scores, candidate_ids, query_ids, labels, margin, k, trust):
    """Columns of the negatives of one row, from the rules in the docstring of HardNegativeInfoNCELoss."""
    batch = len(query_ids)
    answering = [
        j
        for j in range(batch)
        if j == row or query_ids[j] == query_ids[row] or (labels is not None and labels[j] == labels[row])
    ]
    right_contents = {candidate_ids[j] for j in answering} | {query_ids[row]}
    trusted = {candidate_ids[c] for c in range(batch, len(candidate_ids)) if c % batch == row} if trust else set()
    seen, valid = set(), []
    for column, content in enumerate(candidate_ids):
        repeated = content in seen
        seen.add(content)
        if repeated or content in right_contents:
            continue
        if margin is not None and scores[column] > scores[row] + margin and content not in trusted:
            continue
        valid.append(column)
    valid.sort(key=lambda column: -scores[column])
    return valid if k is None else valid[:k]


def weighted_by_hardness(row, column, candidate_ids, batch, mode):
    """Whether a negative is of the kind that ``hardness_mode`` weights; ``candidate_ids`` are of positives first."""
    own = {content for c, content in enumerate(candidate_ids) if c >= batch and c % batch == row}
    return {
        None: False,
        "all_negatives": True,
        "hard_negatives": candidate_ids[column] in own,
        "in_batch_negatives": candidate_ids[column] not in own,
    }[mode]


def contrast(queries, candidates, query_ids, candidate_ids, labels, margin, k, temperature, trust, mode, strength):
    """Loss, gradients of queries and of candidates, and the number of rows without negatives."""
    batch = len(queries)
    to_queries = [[0.0] * len(q) for q in queries]
    to_candidates = [[0.0] * len(c) for c in candidates]
    total, empty = 0.0, 0
    for row, query in enumerate(queries):
        parts = [cosine_and_gradients(query, candidate) for candidate in candidates]
        scores = [part[0] for part in parts]
        negatives = chosen_negatives(row, scores, candidate_ids, query_ids, labels, margin, k, trust)
        empty += not negatives
        members = [row, *negatives]
        logits = [scores[column] / temperature for column in members]
        for place, column in enumerate(negatives, start=1):
            if weighted_by_hardness(row, column, candidate_ids, batch, mode):
                logits[place] += strength * scores[column]  # a constant to the gradient
        probabilities = softmax(logits)
        total -= math.log(probabilities[0]) if probabilities[0] > 0 else -math.inf
        for place, column in enumerate(members):
            slope = (probabilities[place] - (place == 0)) / temperature / batch
            add_scaled(to_queries[row], slope, parts[column][1])
            add_scaled(to_candidates[column], slope, parts[column][2])
    return total / batch, to_queries, to_candidates, empty


def hard_negative_info_nce(
    columns: list[Matrix], ids, labels, margin, k, temperature, trust, mode=None, strength=0.0, both=False
):
    """Loss, gradient per column, and the number of rows without negatives; ``both`` directions or one."""
    queries, candidates = columns[0], [row for column in columns[1:] for row in column]
    candidate_ids = [i for column in ids[1:] for i in column]
    batch = len(queries)
    loss, to_queries, to_candidates, empty = contrast(
        queries, candidates, ids[0], candidate_ids, labels, margin, k, temperature, trust, mode, strength
    )
    gradients = [to_queries, *(to_candidates[i : i + batch] for i in range(0, len(to_candidates), batch))]
    if both:
        other, to_positives, to_queries, _ = contrast(
            columns[1], queries, ids[1], ids[0], labels, margin, k, temperature, False,
            None if mode == "hard_negatives" else mode, strength,
        )  # fmt: skip
        for column, extra in ((0, to_queries), (1, to_positives)):
            for row, direction in enumerate(extra):
                add_scaled(gradients[column][row], 1.0, direction)
        loss = (loss + other) / 2
        gradients = [[[x / 2 for x in row] for row in column] for column in gradients]
    return loss, gradients, empty


def distill_kl(columns: list[Matrix], teachers: list[Matrix], tau_student, tau_teacher, direction, include_diagonal):
    """Loss and gradient per student column; ``teachers`` holds one matrix a column."""
    batch = len(columns[0])
    student = [row for column in columns for row in column]
    teacher = [row for column in teachers for row in column]
    gradient = [[0.0] * len(row) for row in student]
    total, n = 0.0, len(student)
    for i in range(n):
        others = [j for j in range(n) if include_diagonal or j != i]
        if not others:
            continue
        parts = {j: cosine_and_gradients(student[i], student[j]) for j in others}
        q = softmax([parts[j][0] / tau_student for j in others])
        p = softmax([cosine_and_gradients(teacher[i], teacher[j])[0] / tau_teacher for j in others])
        value, slopes = divergence(p, q, direction)
        total += value
        for place, j in enumerate(others):
            slope = slopes[place] / tau_student / n
            add_scaled(gradient[i], slope, parts[j][1])
            add_scaled(gradient[j], slope, parts[j][2])
    return total / n, [gradient[i : i + batch] for i in range(0, n, batch)]


def divergence(p: list[float], q: list[float], direction: str) -> tuple[float, list[float]]:
    """KL divergence of a teacher's p and a student's q, and its slope in each of the student's logits."""
    forward = sum(b * math.log(b / a) for a, b in zip(q, p, strict=True) if b > 0)  # KL(teacher || student)
    backward = sum(a * math.log(a / b) for a, b in zip(q, p, strict=True) if a > 0)  # KL(student || teacher)
    forward_slope = [a - b for a, b in zip(q, p, strict=True)]
    backward_slope = [a * (math.log(a / b) - backward) if a > 0 else 0.0 for a, b in zip(q, p, strict=True)]
    share = {"teacher_student": (1, 0), "student_teacher": (0, 1), "symmetric": (0.5, 0.5)}[direction]
    slopes = [share[0] * a + share[1] * b for a, b in zip(forward_slope, backward_slope, strict=True)]
    return share[0] * forward + share[1] * backward, slopes


def candidate_kl(columns: list[Matrix], scores: list[list[float | None]], tau, tau_teacher, direction):
    """Loss and gradient per column; a score of None is that of a place without a candidate."""
    batch, total = len(columns[0]), 0.0
    gradients = [[[0.0] * len(row) for row in column] for column in columns]
    for row in range(batch):
        own = [place for place, score in enumerate(scores[row]) if score is not None]
        parts = [cosine_and_gradients(columns[0][row], columns[1 + place][row]) for place in own]
        p = softmax([scores[row][place] / tau_teacher for place in own])
        value, slopes = divergence(p, softmax([part[0] / tau for part in parts]), direction)
        total += value
        for place, part, slope in zip(own, parts, slopes, strict=True):
            add_scaled(gradients[0][row], slope / tau / batch, part[1])
            add_scaled(gradients[1 + place][row], slope / tau / batch, part[2])
    return total / batch, gradients
