"""The CUDA backend against the float64 reference and the CPU backend, for every kind of checkpoint.

Weights are bf16 on both sides; the device also rounds activations to bf16 between kernels, so its error is a few times
the CPU's. Rows near a routing tie may choose another expert, which no bound covers; they must stay rare.
"""

import checkpoints
import ling
import numpy as np
import pytest
from test_logits import Case, row_errors

VARIANTS = ["v1-head-96", "v2", "v2-rotary-dim", "v2-yarn", "v2-fp8", "v2-fp8-whole", "v2-sharded"]
BOUND = 0.05  # 3 layers of roundings of half a bf16 ulp, 2^-9, on inputs that add up
ROWS_WITHIN = 0.85  # two rounded runs flip a choice more often than one against the exact reference
FP8_BOUND = 0.2  # experts' inputs in e4m3 too: 4 bits of mantissa, an error of 2^-4 at most, averaged over the sum
FP8_ROWS_WITHIN = 0.75  # the rounding of inputs changes the choice of experts more often
NOISE = 0.05  # of a row's largest logit: a top-2 gap above this must not change the likeliest token


@pytest.fixture(scope="module", params=VARIANTS)
def case(request, tmp_path_factory):
    return Case(request.param, tmp_path_factory.mktemp(request.param))


def load(probe, case, **options):
    answer = probe.ask(op="load", directory=case.directory, backend="cuda", batch_tokens_max=512, **options)
    if not answer["ok"] and answer["code"] == "UNAVAILABLE":
        pytest.skip(answer["error"])
    assert answer["ok"], answer


def assert_close(got, want, what, bound=BOUND):
    got, want = np.array(got), np.array(want)
    errors = row_errors(got, want)
    ordered = np.sort(want, axis=1)
    clear = (ordered[:, -1] - ordered[:, -2]) > bound / BOUND * NOISE * np.abs(want).max(axis=1)
    clear &= errors <= bound  # rows whose routing flipped are counted by the share below
    same = got.argmax(axis=1) == want.argmax(axis=1)
    print(f"{what}: median {np.median(errors):.4f}, largest {errors.max():.4f}, within {bound}: "
          f"{np.mean(errors <= bound):.3f}; {clear.sum()} of {len(want)} rows have a clear likeliest token")
    assert np.mean(errors <= bound) >= (ROWS_WITHIN if bound == BOUND else FP8_ROWS_WITHIN)
    assert clear.sum() >= len(want) // 20 and same[clear].all()


def test_logits_equal_the_reference(probe, case):
    load(probe, case)
    answer = case.whole(probe)
    whole_fp8 = case.variant == "v2-fp8-whole"
    bound = FP8_BOUND if whole_fp8 else BOUND
    if whole_fp8 or not case.config.get("quantization_config"):  # its weights are rounded to bf16 at load: see the CPU's test
        assert_close(answer["logits"], case.logits[: case.length], "against float64", bound)
        if case.mtp:
            assert_close(answer["mtp_logits"], case.mtp_logits, "MTP against float64", bound)
    probe.must(op="load", directory=case.directory, precision="bfloat16", threads=2)
    cpu = case.whole(probe)
    assert_close(answer["logits"], cpu["logits"], "against the CPU", bound)
    if case.mtp:
        assert_close(answer["mtp_logits"], cpu["mtp_logits"], "MTP against the CPU", bound)


def test_token_by_token_equals_one_pass(probe, case):
    """Decode steps run from captured graphs with other kernels than a prompt."""
    load(probe, case)
    whole = case.whole(probe)
    rows = probe.must(op="forward", segments=[dict(case.segment(0, 65, pages=[9, 2, 5]))])["logits"]
    for at in range(65, case.length):
        segment = {"tokens": case.tokens[at : at + 1], "position": at, "pages": [9, 2, 5]}
        rows += probe.must(op="forward", segments=[segment])["logits"]
    assert_close(rows, whole["logits"], "decode against one pass", FP8_BOUND if case.variant == "v2-fp8-whole" else BOUND)


def test_batch_mates_are_no_matter(probe, case):
    load(probe, case)
    tokens = case.tokens
    for at in (0, 1):  # the first step fills the pages
        segments = [{"tokens": tokens[i : i + 64] if at == 0 else tokens[i + 64 : i + 65], "position": 64 * at,
                     "pages": [2 * i, 2 * i + 1]} for i in range(5)]
        together = probe.must(op="forward", segments=segments)["logits"]
    alone = [probe.must(op="forward", segments=[segment])["logits"][0] for segment in segments]
    assert_close(together, alone, "five sequences together", FP8_BOUND if case.variant == "v2-fp8-whole" else BOUND)
