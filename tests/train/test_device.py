"""Training and scoring beside the processor: on a GPU where there is one, else on the device of torch_xla.

torch_xla (`pip install torch_xla`, with the torch it asks for; run with PJRT_DEVICE=CPU) computes on the processor but
keeps its tensors apart as a GPU does, so that whatever is left behind on the wrong side fails.
"""

from __future__ import annotations

import pytest
import torch
from planted import QUICK, planted_set

from nc_audit.recipe import ScoreSection
from nc_audit.rivals import Reach, look_around
from nc_audit.score import Draw, judge
from nc_audit.train import Inputs, train

SETTINGS = QUICK.model_copy(update={"steps": 24, "epochs": 6, "pace_from": 2, "final_rounds": 1})
SCORING = ScoreSection(candidates=64, references=200)  # type: ignore[call-arg]


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> str:
    if torch.cuda.is_available():
        return "cuda"
    xla = pytest.importorskip("torch_xla", reason="there is neither a GPU nor torch_xla")
    xla.experimental.eager_mode(True)  # ops one by one; whole graphs of so many shapes exhaust its compiler
    optimiser, fork = torch.optim.AdamW, torch.random.fork_rng

    def unfused(*given, fused, **more):  # torch_xla has no fused one
        return optimiser(*given, **more)

    monkeypatch.setattr(torch.optim, "AdamW", unfused)
    monkeypatch.setattr(torch.random, "fork_rng", lambda devices, device_type: fork(devices=[]))
    return "xla:0"


def audited(planted, device: str, precision: str):
    inputs = Inputs.prepare(
        planted.image_ID,
        planted.caption_CD,
        planted.pairs,
        SETTINGS,
        SCORING.candidates,
        precision=precision,
        device=device,
    )
    judgement = train(inputs, SETTINGS)
    with torch.no_grad():
        vectors = judgement.model.to(device).embed(planted.image_ID, planted.caption_CD)
        whole = judgement.facts["whole_images"]
        draw = Draw(judgement.given, judgement.swaps, *vectors)
        rate, columns = judge([draw], planted.pairs, SCORING, 0, whole_images=whole)
        around = look_around(*vectors, planted.pairs, Reach(150), 0)
    return inputs, vectors, rate, judgement.given | judgement.swaps | columns | around


@pytest.mark.parametrize("whole_images", [False, True])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_another_device_finds_what_the_processor_finds(device, precision, whole_images):
    planted = planted_set(num_images=120, whole_images=whole_images)
    inputs, vectors, rate, columns = audited(planted, device, precision)
    _, _, expected, same = audited(planted, "cpu", precision)
    kind = torch.device(device).type
    assert {inputs.image_head_ID.device.type, inputs.caption_head_CD.device.type} == {kind}
    assert {one.device.type for one in vectors} == {kind}
    assert {one.device.type for one in columns.values()} == {"cpu"}
    assert torch.equal(columns["first"], same["first"])  # the first look stays on the processor
    assert rate.estimate == pytest.approx(expected.estimate, abs=0.05)  # dropout draws differ
    one, other = columns["noise_score"], same["noise_score"]
    assert torch.corrcoef(torch.stack([one, other]))[0, 1] > 0.95
    one, other = columns["caption_rank"].float(), same["caption_rank"].float()
    assert torch.corrcoef(torch.stack([one, other]))[0, 1] > 0.9
