from __future__ import annotations

import json
import math

import open_clip
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from nc_audit.encoders import plan_encoders
from nc_audit.encoders.open_clip_towers import OpenClipModel
from nc_audit.errors import TrainingError
from nc_audit.methods.contrastive import in_batch_loss, negatives_mask
from nc_audit.methods.matching import Pairs
from nc_audit.recipe import TowersSection, TrainSection
from nc_audit.train.towers import CHECKPOINT, RESULT, Schedule, fine_tune

VISION = {"image_size": 32, "layers": 1, "width": 16, "patch_size": 8, "head_width": 8}
TEXT = {"context_length": 77, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1}
MODELS = {
    "tuned-clip": {"embed_dim": 16, "vision_cfg": VISION, "text_cfg": TEXT},
    "tuned-dropping": {"embed_dim": 16, "vision_cfg": VISION | {"patch_dropout": 0.5}, "text_cfg": TEXT},
}
COLOURS = {"red": (1, 0, 0), "green": (0, 1, 0), "blue": (0, 0, 1), "yellow": (1, 1, 0), "white": (1, 1, 1)}
PLACES = ("left", "right")
NUM_IMAGES = 60


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    for name, config in MODELS.items():
        (folder / f"{name}.json").write_text(json.dumps(config))
    open_clip.add_model_config(folder)
    torch.manual_seed(0)
    found = {}
    for name in MODELS:
        found[name] = folder / f"{name}.safetensors"
        model = open_clip.create_model(name, load_weights=False)
        save_file({key: value.contiguous() for key, value in model.state_dict().items()}, found[name])
    return found


def towers(files, name="tuned-clip", precision="fp32"):
    plan = plan_encoders(f"open_clip:{name}@{files[name]}", device="cpu", precision=precision)
    return OpenClipModel(plan.image, None, plan)


def scene(image):
    """Colour and place of an image: every fifth has the same colour, every second the same place."""
    return list(COLOURS)[image % 5], PLACES[image % 2]


def decode(image):
    colour, place = scene(image)
    pixels = torch.randint(0, 90, (3, 32, 32), generator=torch.Generator().manual_seed(image))
    half = slice(0, 16) if place == "left" else slice(16, 32)
    pixels[:, :, half] += 160 * torch.tensor(COLOURS[colour])[:, None, None]
    return pixels.to(torch.uint8), None


CAPTIONS = [
    f"a {colour} field on the {place}" for image in range(NUM_IMAGES) for colour, place in [scene(image)]
]
DISTINCT = sorted(set(CAPTIONS))
GIVEN = Pairs(
    torch.arange(NUM_IMAGES),
    torch.tensor([DISTINCT.index(one) for one in CAPTIONS]),
    NUM_IMAGES,
    len(DISTINCT),
)


def settings(**tower):
    quick = {
        "epochs": 3,
        "batch": 20,
        "lr": 2e-3,
        "warm_up_steps": 2,
        "weight_decay": 0.1,
        "checkpoint_every": 5,
    }
    return TrainSection(tower=TowersSection(**(quick | tower)))


def loss_of(outputs):
    """Contrastive loss on embeddings and on patches against words."""
    counts = negatives_mask(outputs.image_B, outputs.caption_B)
    patches = torch.nn.functional.normalize(outputs.image_tokens_BPD, dim=2)
    words = torch.nn.functional.normalize(outputs.caption_tokens_BLD, dim=2) * outputs.is_word_BL[:, :, None]
    local = torch.einsum("ipd,cld->icpl", patches, words).pow(2).sum((2, 3)).sqrt()
    whole = outputs.image_BD @ outputs.caption_BD.T
    return (in_batch_loss(20 * whole, counts) + in_batch_loss(local, counts)).mean()


def trained(files, folder, *, name="tuned-clip", precision="fp32", objective=loss_of, decode=decode, **tower):
    model = towers(files, name, precision)
    fine_tune(model, decode, DISTINCT, GIVEN, objective, settings(**tower), folder)
    return model


class _Killed(BaseException):
    pass


def killed_at(step):
    def progress(_what, done, _total):
        if done == step:
            raise _Killed

    return progress


def test_the_loss_falls_and_images_find_captions_of_their_colour(files, tmp_path):
    losses = []

    def objective(outputs):
        loss = loss_of(outputs)
        losses.append(loss.item())
        return loss

    model = trained(files, tmp_path, objective=objective, epochs=10)
    assert len(losses) == 10 * 3
    assert sum(losses[-3:]) < 0.6 * sum(losses[:3])
    image = model.image_encoder().encode(torch.stack([decode(image)[0] for image in range(NUM_IMAGES)]))
    best = (image @ model.text_encoder().encode(DISTINCT).T).argmax(1).tolist()
    named = [DISTINCT[at].split()[1] == scene(image)[0] for image, at in enumerate(best)]
    assert sum(named) > 0.9 * NUM_IMAGES


@pytest.mark.parametrize(
    ("name", "precision", "step"),
    [
        ("tuned-clip", "fp32", 3),
        ("tuned-clip", "fp32", 5),
        ("tuned-clip", "fp32", 8),
        ("tuned-clip", "bf16", 8),
        ("tuned-dropping", "fp32", 8),
    ],
)
def test_killed_and_started_again_equals_undisturbed(files, tmp_path, name, precision, step):
    trained(files, tmp_path / "whole", name=name, precision=precision)
    torch.manual_seed(step)  # what the caller drew does not matter
    with pytest.raises(_Killed):
        fine_tune(
            towers(files, name, precision),
            decode,
            DISTINCT,
            GIVEN,
            loss_of,
            settings(),
            tmp_path / "cut",
            killed_at(step),
        )
    assert not (tmp_path / "cut" / RESULT).exists()
    assert (tmp_path / "cut" / CHECKPOINT).exists() == (step >= 5)
    seen = []
    again = towers(files, name, precision)
    arguments = (DISTINCT, GIVEN, loss_of, settings(), tmp_path / "cut")
    fine_tune(again, decode, *arguments, lambda _what, done, total: seen.append((done, total)))
    assert seen == [(done, 9) for done in range(step // 5 * 5, 10)]
    assert (tmp_path / "cut" / RESULT).read_bytes() == (tmp_path / "whole" / RESULT).read_bytes()
    assert sorted(path.name for path in (tmp_path / "cut").iterdir()) == [RESULT]


def test_training_leaves_the_model_frozen_and_the_callers_randomness_alone(files, tmp_path):
    owner = towers(files, "tuned-dropping")
    state = torch.get_rng_state()
    fine_tune(owner, decode, DISTINCT, GIVEN, loss_of, settings(epochs=1), tmp_path)
    model = owner.model
    assert torch.equal(torch.get_rng_state(), state)
    assert not model.training
    assert not any(value.requires_grad or value.grad is not None for value in model.parameters())
    assert not model.visual.transformer.grad_checkpointing
    assert not model.transformer.grad_checkpointing


def test_every_step_draws_anew_and_every_run_the_same(files, tmp_path):
    drawn = []

    def objective(outputs):
        drawn.append(torch.rand(1).item())
        return loss_of(outputs)

    for folder in ("one", "two"):
        trained(files, tmp_path / folder, objective=objective, epochs=1)
    assert len(set(drawn[:3])) == 3
    assert drawn[:3] == drawn[3:]


def test_the_result_holds_the_weights_and_is_used_again(files, tmp_path):
    model = trained(files, tmp_path, epochs=1)
    saved = load_file(tmp_path / RESULT)
    assert all(torch.equal(saved[name], value) for name, value in model.tensors.items())
    again = trained(files, tmp_path, epochs=1, objective=lambda _: pytest.fail("trained again"))
    assert again.digest() == model.digest()


def test_what_other_settings_left_is_not_used(files, tmp_path):
    with pytest.raises(_Killed):
        fine_tune(towers(files), decode, DISTINCT, GIVEN, loss_of, settings(), tmp_path, killed_at(7))
    trained(files, tmp_path, lr=1e-3)
    trained(files, tmp_path / "other", lr=1e-3)
    assert (tmp_path / RESULT).read_bytes() == (tmp_path / "other" / RESULT).read_bytes()


def test_what_other_captions_left_is_not_used(files, tmp_path):
    trained(files, tmp_path, epochs=1)
    other = [caption.replace("field", "roof") for caption in DISTINCT]
    fine_tune(towers(files), decode, other, GIVEN, loss_of, settings(epochs=1), tmp_path)
    fine_tune(towers(files), decode, other, GIVEN, loss_of, settings(epochs=1), tmp_path / "other")
    assert (tmp_path / RESULT).read_bytes() == (tmp_path / "other" / RESULT).read_bytes()


def test_how_often_it_is_saved_and_decoded_by_how_many_changes_nothing(files, tmp_path):
    one = trained(files, tmp_path / "one", checkpoint_every=3, workers=1)
    two = trained(files, tmp_path / "two", checkpoint_every=100, workers=8)
    assert one.digest() == two.digest()


def test_recomputed_activations_give_the_same_weights(files, tmp_path):
    one = trained(files, tmp_path / "one", epochs=2).tensors
    two = trained(files, tmp_path / "two", epochs=2, grad_checkpointing=False).tensors
    for name, value in one.items():
        torch.testing.assert_close(value, two[name], rtol=0, atol=1e-6)


def test_a_damaged_checkpoint_is_told_and_not_used(files, tmp_path, caplog):
    whole = trained(files, tmp_path / "whole")
    (tmp_path / "cut").mkdir()
    (tmp_path / "cut" / CHECKPOINT).write_bytes(b"\x10\0\0\0\0\0\0\0{nonsense")
    assert trained(files, tmp_path / "cut").digest() == whole.digest()
    assert f"{CHECKPOINT} is damaged and is not used" in caplog.text


def test_decay_spares_vectors(files, tmp_path):
    before = {name: value.clone() for name, value in towers(files).tensors.items()}

    def nothing(outputs):
        return 0 * (loss_of(outputs) + outputs.logit_scale)

    after = trained(files, tmp_path, objective=nothing, weight_decay=10.0, epochs=1, warm_up_steps=0).tensors
    for name, value in before.items():
        kept = (
            1.0
            if value.dim() < 2
            else math.prod(1 - 10 * 2e-3 * (1 + math.cos(math.pi * s / 3)) / 2 for s in range(3))
        )
        torch.testing.assert_close(after[name], value * kept, rtol=1e-5, atol=1e-7)


def test_outputs_say_which_pairs_they_are(files, tmp_path):
    seen = []

    def objective(outputs):
        assert torch.equal(outputs.image_B, GIVEN.image_N[outputs.pair_B])
        assert torch.equal(outputs.caption_B, GIVEN.caption_N[outputs.pair_B])
        assert outputs.image_tokens_BPD.shape == (20, 16, 16)
        assert outputs.is_word_BL.sum(1).tolist() == [6] * 20
        torch.testing.assert_close(outputs.image_BD.norm(dim=1), torch.ones(20))
        assert outputs.logit_scale.item() == pytest.approx(1 / 0.07, rel=1e-4)
        seen.append(outputs.pair_B)
        return loss_of(outputs)

    trained(files, tmp_path, objective=objective, epochs=2)
    epochs = torch.stack(seen).view(2, -1)
    assert [sorted(epoch) for epoch in epochs.tolist()] == [list(range(NUM_IMAGES))] * 2
    assert not torch.equal(*epochs)


def test_several_captions_of_an_image_share_its_tower_pass(files, tmp_path):
    pairs = Pairs(torch.arange(10).repeat_interleave(4), torch.arange(40) % len(DISTINCT), 10, len(DISTINCT))
    asked = []

    def counting(image):
        asked.append(image)
        return decode(image)

    def objective(outputs):
        same = outputs.image_B[:, None] == outputs.image_B[None, :]
        alike = torch.isclose(outputs.image_BD[:, None], outputs.image_BD[None, :], rtol=0, atol=0).all(2)
        assert (alike == same).all()
        return loss_of(outputs)

    fine_tune(towers(files), counting, DISTINCT, pairs, objective, settings(batch=40, epochs=1), tmp_path)
    assert sorted(asked) == list(range(10))


def test_pairs_whose_image_cannot_be_decoded_sit_out(files, tmp_path, caplog):
    seen = []

    def objective(outputs):
        seen.extend(outputs.image_B.tolist())
        first = decode(int(outputs.image_B[0]))[0][None]
        torch.testing.assert_close(model.image_outputs(first)[0][0], outputs.image_BD[0], rtol=0, atol=1e-5)
        return loss_of(outputs)

    def failing(image):
        return (None, ValueError("cut in half")) if image % 3 == 0 else decode(image)

    model = towers(files)
    fine_tune(model, failing, DISTINCT, GIVEN, objective, settings(epochs=1), tmp_path)
    assert sorted(seen) == [image for image in range(NUM_IMAGES) if image % 3]
    assert "images: cut in half" in caplog.text


def test_a_batch_without_one_image_is_an_error(files, tmp_path):
    with pytest.raises(TrainingError) as caught:
        trained(files, tmp_path, decode=lambda _: (None, ValueError("cut in half")))
    assert str(caught.value) == "no image of step 0 can be decoded: cut in half (check the images)"


def test_a_loss_that_is_not_finite_is_an_error(files, tmp_path):
    with pytest.raises(TrainingError) as caught:
        trained(files, tmp_path, objective=lambda outputs: loss_of(outputs) * float("nan"))
    assert str(caught.value) == (
        "loss is nan with a gradient of norm nan at step 0 (lr 0.002) (lower train.tower.lr)"
    )
    assert not list(tmp_path.iterdir())


def test_memory_that_runs_out_is_an_error(files, tmp_path):
    def objective(_outputs):
        raise torch.OutOfMemoryError("CUDA out of memory")

    for checkpointing, hint in ((True, ""), (False, ", or set grad_checkpointing")):
        with pytest.raises(TrainingError) as caught:
            trained(files, tmp_path, objective=objective, grad_checkpointing=checkpointing)
        assert str(caught.value) == f"memory runs out at 20 pairs per batch (lower train.tower.batch{hint})"


def test_files_hold_tensors_and_say_what_they_belong_to(files, tmp_path):
    with pytest.raises(_Killed):
        fine_tune(towers(files), decode, DISTINCT, GIVEN, loss_of, settings(), tmp_path, killed_at(7))
    with safe_open(tmp_path / CHECKPOINT, "pt") as file:
        header, names = json.loads(file.metadata()["training"]), set(file.keys())
    assert header["step"] == 5
    assert len(header["key"]) == 32
    assert {
        "weights/visual.proj",
        "optimiser/0/exp_avg",
        "optimiser/0/exp_avg_sq",
        "optimiser/0/step",
    } <= names


def test_the_learning_rate_rises_and_falls():
    schedule = Schedule.of(1000, TrainSection(tower=TowersSection(epochs=50)))
    assert (schedule.steps, schedule.batch, schedule.warm_up) == (500, 100, 50)
    rates = [schedule.lr_at(step) for step in range(500)]
    assert rates[0] == pytest.approx(7e-6 / 50)
    assert rates[49] == rates[50] == pytest.approx(7e-6)
    assert rates[275] == pytest.approx(3.5e-6)
    assert 0 < rates[-1] < 1e-10
    assert Schedule.of(20_000, TrainSection()).warm_up == 200


@given(st.integers(2, 60), st.integers(2, 30), st.integers(1, 4), st.integers(0, 3), st.data())
def test_batches_hold_distinct_pairs_and_go_on_anywhere(num_pairs, batch, epochs, seed, data):
    schedule = Schedule.of(
        num_pairs, TrainSection(seed=seed, tower=TowersSection(epochs=epochs, batch=batch))
    )
    steps = list(schedule.positions(0))
    per_epoch = num_pairs // min(batch, num_pairs)
    assert [step for step, _ in steps] == list(range(epochs * per_epoch))
    for epoch in range(epochs):
        taken = torch.cat([at for _, at in steps[epoch * per_epoch : (epoch + 1) * per_epoch]]).tolist()
        assert len(taken) == len(set(taken)) == per_epoch * min(batch, num_pairs)
        assert set(taken) <= set(range(num_pairs))
    first = data.draw(st.integers(0, len(steps)))
    rest = list(schedule.positions(first))
    assert [at.tolist() for _, at in rest] == [at.tolist() for _, at in steps[first:]]
