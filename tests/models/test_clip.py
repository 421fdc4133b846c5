"""CLIP as a classifier: agreement with open_clip, the text cache, weights of every form, bad input."""

import contextlib
import math
import os
import pickle
import sys
import tracemalloc
import zipfile

import pytest
import torch

from data import clip_preset, load_task
from data.text import build_prompts
from models import SWITCHES, WatermarkingVR, build_classifier, build_network, clip, clip_weights, text_embeddings
from models.clip import TINY_BACKBONE, Clip, load_clip
from models.clip_weights import read_openais
from models.text_embeddings import embed_texts
from models.torchvision_shim import ensure_torchvision
from models.weight_files import read_torchscript_state_dict
from tests.data.helpers import write_flowers_subset
from tests.models.meaningful_clip import build_meaningful_clip

ensure_torchvision()
import open_clip  # noqa: E402

NAMES = ["oxeye daisy", "globe flower", "tiger lily"]
TEMPLATES = ["This is a photo of a {}.", "a close-up photo of a {}.", "art of the {}."]
PROMPTS = build_prompts(NAMES, TEMPLATES)


def tiny(seed=0, weights="none"):
    return load_clip(TINY_BACKBONE, weights, seed).classifier(PROMPTS)


def with_prompts(model, tokenizer, input_size):
    return Clip(model, tokenizer, "other", input_size, (0.5,) * 3, (0.5,) * 3).classifier(PROMPTS)


def tiny_model(seed=0, **changes):
    """The library's own model behind `tiny`, with its tokenizer."""
    return clip._build(TINY_BACKBONE, clip._look_up(TINY_BACKBONE) | changes, seed)


def images(n=2, seed=1):
    return torch.randn(n, 3, 224, 224, generator=torch.Generator().manual_seed(seed))


def test_logits_are_those_of_open_clip_itself():
    model, tokenizer = tiny_model()
    with torch.no_grad():
        expected, _ = model.eval().get_logits(images(), tokenizer(PROMPTS.texts))
        torch.testing.assert_close(tiny()(images()), expected, atol=1e-5, rtol=0)


def test_zero_shot_is_that_of_open_clip_itself():
    model, tokenizer = tiny_model()
    classifier = tiny()
    ours, logits = classifier.zero_shot_classifiers(), classifier.zero_shot_logits(images())
    for kind, templates in (("single", TEMPLATES[:1]), ("ensemble", TEMPLATES)):
        theirs = open_clip.build_zero_shot_classifier(model.eval(), tokenizer, NAMES, templates)
        torch.testing.assert_close(ours[kind], theirs, atol=1e-5, rtol=0)
        with torch.no_grad():
            expected = model.logit_scale.exp() * model.encode_image(images(), normalize=True) @ theirs
        torch.testing.assert_close(logits[kind], expected, atol=1e-5, rtol=0)


def test_the_single_template_is_the_first_block_of_logits():
    classifier = tiny()
    torch.testing.assert_close(classifier.zero_shot_logits(images())["single"], classifier(images())[:, :3])


def test_what_travels_with_the_classifier():
    loaded = load_clip(TINY_BACKBONE, "none")
    assert (loaded.input_size, loaded.interpolation, loaded.resize_mode) == (224, "bicubic", "shortest")
    classifier = loaded.classifier(PROMPTS)
    assert classifier.num_source == 9 and classifier.source_names[4] == "a close-up photo of a globe flower."
    assert classifier.mean == open_clip.OPENAI_DATASET_MEAN and classifier.std == open_clip.OPENAI_DATASET_STD
    assert classifier.input_size == 224 and classifier.prompts is PROMPTS
    assert not classifier.train().training
    assert not any(parameter.requires_grad for parameter in classifier.parameters())


def test_the_gradient_reaches_the_pattern_and_descends():
    classifier = tiny()
    pattern = torch.zeros(1, 3, 224, 224, requires_grad=True)
    labels = torch.tensor([4, 8])
    losses = []
    for _ in range(5):
        loss = torch.nn.functional.cross_entropy(classifier(images() + pattern), labels)
        (gradient,) = torch.autograd.grad(loss, pattern)
        assert gradient.isfinite().all() and gradient.abs().sum() > 0
        pattern = (pattern - 40 * gradient).detach().requires_grad_()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert classifier.net.logit_scale.item() == pytest.approx(math.log(1 / 0.07))


def test_a_logit_scale_above_openais_limit_is_left_alone():
    model, tokenizer = tiny_model(init_logit_scale=6.0)
    classifier = with_prompts(model, tokenizer, 224)
    logits = classifier(images())
    assert classifier.net.logit_scale.item() == 6.0
    torch.testing.assert_close(logits, tiny()(images()) * math.exp(6.0) * 0.07)


def test_logits_stay_float32_under_autocast():
    classifier = tiny()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        embeddings = classifier.net.image_encoder(images())
        logits = classifier.net.similarity(embeddings, classifier.net.text_embeddings)
    assert embeddings.dtype == logits.dtype == torch.float32
    exact = math.exp(math.log(1 / 0.07)) * embeddings.double() @ classifier.net.text_embeddings.double().T
    torch.testing.assert_close(logits.double(), exact, atol=1e-5, rtol=0)


def fold_inputs(num_source, bias):
    """ω as of a Bayesian mapping, one-to-one, and signed as a learned or closed-form one, each (S, T)."""
    generator = torch.Generator().manual_seed(2)
    bayes = torch.rand(num_source, 4, generator=generator) ** 8
    one_to_one = torch.zeros(num_source, 4)
    one_to_one[torch.randperm(num_source, generator=generator)[:4], torch.arange(4)] = 1
    signed = torch.randn(num_source, 4, generator=generator) / num_source**0.5
    kinds = bayes / bayes.sum(0), one_to_one, signed
    return [(weights, torch.randn(4, generator=generator) if bias else None) for weights in kinds]


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("build", [tiny, lambda: with_prompts(*siglip_like(), 32)])
def test_a_folded_mapping_is_the_mapping_of_the_logits(build, bias):
    classifier = build()
    size = classifier.input_size
    embeddings = classifier.net.image_encoder(images(3)[..., :size, :size])
    logits = classifier.net.logits(embeddings)
    assert torch.equal(logits, classifier(images(3)[..., :size, :size]))
    for weights, bias_t in fold_inputs(len(PROMPTS), bias):
        folded, folded_bias = classifier.net.fold(weights, bias_t)
        assert folded.shape == (embeddings.shape[1], 4) and folded_bias.shape == (4,)
        expected = logits.double() @ weights.double() + (0 if bias_t is None else bias_t.double())
        torch.testing.assert_close((embeddings @ folded + folded_bias).double(), expected, atol=1e-5, rtol=1e-5)


def test_a_mapping_of_sun397s_prompts_folds_as_exactly():
    generator = torch.Generator().manual_seed(0)
    texts, embeddings = (
        torch.nn.functional.normalize(torch.randn(rows, 512, generator=generator), dim=1) for rows in (32_157, 8)
    )
    net = clip.ClipNet(torch.nn.Identity(), texts, torch.tensor(math.log(100.0)))
    for weights, _ in fold_inputs(32_157, bias=False):
        folded, bias = net.fold(weights)
        expected = net.logit_scale.double().exp() * embeddings.double() @ texts.double().T @ weights.double()
        torch.testing.assert_close((embeddings @ folded + bias).double(), expected, atol=1e-5, rtol=0)


def test_the_gradient_of_a_folded_mapping_is_that_of_the_mapping():
    net = tiny().net
    embeddings = net.image_encoder(images(3)).detach()
    weights = fold_inputs(len(PROMPTS), bias=False)[2][0].requires_grad_()
    labels = torch.tensor([0, 3, 1])
    folded, bias = net.fold(weights)
    gradients = [
        torch.autograd.grad(torch.nn.functional.cross_entropy(logits, labels), weights)[0]
        for logits in (embeddings @ folded + bias, net.logits(embeddings) @ weights)
    ]
    torch.testing.assert_close(*gradients, atol=1e-6, rtol=1e-5)


def test_folding_stays_float32_under_autocast():
    net, (weights, _) = tiny().net, fold_inputs(len(PROMPTS), bias=False)[0]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        folded, bias = net.fold(weights)
    assert folded.dtype == bias.dtype == torch.float32 and torch.equal(folded, net.fold(weights)[0])


@pytest.mark.parametrize("switches", [(), tuple(SWITCHES)])
def test_a_network_of_the_image_encoder_gives_embeddings(switches):
    classifier = tiny()
    vr = WatermarkingVR(224, 30, classifier.mean, classifier.std)
    torch.nn.init.normal_(vr.program)
    network = build_network(classifier.net.image_encoder, vr, switches=switches)
    pixels = images(3).sigmoid()
    expected = classifier(vr(pixels))
    torch.testing.assert_close(classifier.net.logits(network(pixels)), expected, atol=1e-4, rtol=1e-4)


def test_random_weights_follow_the_seed_and_leave_the_generator_alone():
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first, again, other = tiny(seed=3), tiny(seed=3), tiny(seed=4)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(first.net.text_embeddings, again.net.text_embeddings)
    assert not torch.equal(first.net.text_embeddings, other.net.text_embeddings)


class Counting:
    """A tokenizer that counts the texts it is given."""

    def __init__(self, tokenizer):
        self.tokenizer, self.context_length, self.seen = tokenizer, tokenizer.context_length, 0

    def __call__(self, texts):
        self.seen += len(texts)
        return self.tokenizer(texts)


def embed(cache_path, seed=0, texts=PROMPTS.texts, batch_size=4, **changes):
    model, tokenizer = tiny_model(seed, **changes)
    counting = Counting(tokenizer)
    embeddings = embed_texts(model.eval(), counting, texts, cache_path=cache_path, batch_size=batch_size)
    return embeddings, counting.seen


def test_text_embeddings_are_computed_once_for_each_model_and_text(tmp_path):
    first, seen = embed(tmp_path / "text")
    assert seen == 9 and first.shape == (9, 32)
    torch.testing.assert_close(first.norm(dim=1), torch.ones(9))
    again, seen = embed(tmp_path / "text")
    assert seen == 0 and torch.equal(first, again)
    assert embed(tmp_path / "text", seed=1)[1] == 9
    assert embed(tmp_path / "text", texts=PROMPTS.texts[::-1])[1] == 9
    assert embed(tmp_path / "text", quick_gelu=True)[1] == 9  # the same weights under another activation
    assert len(list((tmp_path / "text").iterdir())) == 4
    whole, _ = embed(None, batch_size=9)
    torch.testing.assert_close(first, whole, atol=1e-6, rtol=0)


@pytest.mark.parametrize("damage", ["empty", "truncated", "flipped", "pickle", "fewer"])
def test_a_damaged_text_cache_is_made_again(tmp_path, damage):
    first, _ = embed(tmp_path)
    (file,) = tmp_path.iterdir()
    content = bytearray(file.read_bytes())
    if damage == "empty":
        file.write_bytes(b"")
    elif damage == "truncated":
        file.write_bytes(content[: len(content) // 2])
    elif damage == "flipped":
        content[content.index(first.numpy().tobytes()[:64]) + 32] ^= 1
        file.write_bytes(content)
    elif damage == "pickle":
        file.write_bytes(pickle.dumps(print, protocol=2))
    else:
        text_embeddings._write_embeddings(file, first[:5])
    again, seen = embed(tmp_path)
    assert seen == 9 and torch.equal(first, again)
    assert embed(tmp_path)[1] == 0 and list(tmp_path.iterdir()) == [file]


def test_the_text_cache_is_as_readable_as_other_files(tmp_path):
    embed(tmp_path)
    (tmp_path / "other").touch()
    (file,) = tmp_path.glob("text_*.safetensors")
    assert file.stat().st_mode == (tmp_path / "other").stat().st_mode


def test_embedding_stops_between_batches_when_asked(tmp_path):
    model, tokenizer = tiny_model()
    counting = Counting(tokenizer)
    with pytest.raises(InterruptedError, match="stopped after 4 of 9 text embeddings"):
        embed_texts(
            model.eval(),
            counting,
            PROMPTS.texts,
            cache_path=tmp_path,
            batch_size=4,
            should_stop=lambda: counting.seen >= 4,
        )
    assert counting.seen == 4 and not list(tmp_path.iterdir())
    with pytest.raises(InterruptedError):
        load_clip(TINY_BACKBONE, "none").classifier(PROMPTS, should_stop=lambda: True)


def test_a_bar_counts_the_prompts_on_a_terminal_alone(monkeypatch, capsys):
    embed(None)
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    monkeypatch.setattr(text_embeddings, "BAR_AFTER", 0)
    embed(None)
    assert "text embeddings" in capsys.readouterr().err


def test_sun397s_number_of_prompts():
    prompts = build_prompts([f"scene {i}" for i in range(397)])
    model, tokenizer = tiny_model()
    embeddings = torch.nn.functional.normalize(torch.randn(len(prompts), 32), dim=1)
    net = clip.ClipNet(model.visual.eval(), embeddings, model.logit_scale)
    logits = net(images(2))
    assert logits.shape == (2, 32_157) and logits.dtype == torch.float32


def siglip_like():
    config = {
        "embed_dim": 24, "init_logit_bias": -10.0, "init_logit_scale": 2.0,
        "vision_cfg": {"image_size": 32, "timm_model_name": "resnet10t", "timm_pool": "avg",
                       "timm_proj": "linear"},
        "text_cfg": {"context_length": 16, "width": 24, "heads": 2, "layers": 1, "no_causal_mask": True,
                     "pool_type": "last", "proj_bias": True},
    }  # fmt: skip
    return open_clip.CustomTextCLIP(**config), open_clip.SimpleTokenizer(context_length=16)


def coca_like():
    config = {
        "embed_dim": 24,
        "vision_cfg": {"image_size": 32, "patch_size": 16, "width": 24, "head_width": 12, "layers": 1,
                       "attentional_pool": True, "attn_pooler_heads": 2, "output_tokens": True},
        "text_cfg": {"context_length": 15, "width": 24, "heads": 2, "layers": 1, "embed_cls": True,
                     "output_tokens": True},
        "multimodal_cfg": {"context_length": 15, "width": 24, "heads": 2, "layers": 1,
                           "attn_pooler_heads": 2},
    }  # fmt: skip
    return open_clip.CoCa(**config), open_clip.SimpleTokenizer(context_length=15)


@pytest.mark.parametrize("build", [siglip_like, coca_like])
def test_models_of_another_form_give_their_own_logits(build):
    model, tokenizer = build()
    classifier = with_prompts(model, tokenizer, 32)
    pixels = images()[..., :32, :32]
    bias = 0 if getattr(model, "logit_bias", None) is None else -10
    with torch.no_grad():
        text = model.encode_text(tokenizer(PROMPTS.texts), normalize=True)
        expected = model.logit_scale.exp() * model.encode_image(pixels, normalize=True) @ text.T + bias
        torch.testing.assert_close(classifier(pixels), expected, atol=1e-5, rtol=1e-5)
        single = classifier.zero_shot_logits(pixels)["single"]
    torch.testing.assert_close(single, expected[:, :3], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("wrapped", [False, True])
def test_a_local_checkpoint_is_read(tmp_path, wrapped):
    state = tiny_model(seed=7)[0].state_dict()
    if wrapped:  # as open_clip's training script leaves it
        state = {"epoch": 3, "state_dict": {f"module.{key}": value for key, value in state.items()}}
    torch.save(state, tmp_path / "tiny.pt")
    torch.testing.assert_close(tiny(weights=tmp_path / "tiny.pt")(images()), tiny(seed=7)(images()))


def save_archive(path, seed):
    """A TorchScript archive in half precision with constants beside the weights, as OpenAI publishes."""
    model = tiny_model(seed, quick_gelu=True)[0].eval()
    model.register_buffer("input_resolution", torch.tensor(224))
    traced = torch.jit.trace(model, (images(1), torch.zeros(1, 32, dtype=torch.long)), check_trace=False)
    traced.half().save(path)
    return model.float()  # the traced model shares its tensors, which half precision has rounded


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
def test_openais_archives_are_read_without_running_them(tmp_path):
    model = save_archive(tmp_path / "openai.pt", seed=7)
    state = read_openais(tmp_path / "openai.pt", TINY_BACKBONE)
    assert state.keys() == model.state_dict().keys() - {"input_resolution"}
    assert all(torch.equal(value, model.state_dict()[key].half()) for key, value in state.items())
    classifier = tiny(weights=tmp_path / "openai.pt")
    with torch.no_grad():
        expected, _ = model.get_logits(images(), tiny_model()[1](PROMPTS.texts))
    # Quick GELU came with the archive.
    torch.testing.assert_close(classifier(images()), expected, atol=1e-5, rtol=0)


def write_archive(file, pickled, records=(), compression=zipfile.ZIP_STORED):
    with zipfile.ZipFile(file, "w", compression) as archive:
        for name, content in {"constants.pkl": b"", "data.pkl": pickled, **dict(records)}.items():
            archive.writestr(f"bad/{name}", content)


# of a module's class, an instance; BUILD sets its attributes
MODULE = b"c__torch__.M\nM\n)\x81"


def endless(levels=40):
    """Modules that hold the one before twice: 2^levels ways through a kilobyte."""
    pickled = b"\x80\x02" + MODULE + b"q\x00"
    for level in range(levels):
        held = b"h" + bytes([level])
        pickled += MODULE + b"}(" + b"X\x01\x00\x00\x00a" + held + b"X\x01\x00\x00\x00b" + held + b"ub"
        pickled += b"q" + bytes([level + 1])
    return pickled + b"."


@pytest.mark.parametrize(
    ("pickled", "message"),
    [
        (pickle.dumps(exec), "names builtins.exec"),
        (b"\x80\x02]r\xff\xff\xff\x01.", None),  # a memo index in the place of 33 million
        (b"\x80\x05\x96" + (1 << 28).to_bytes(8, "little") + b".", "holds a bytearray"),
        (b"\x80\x04\x8e" + (1 << 40).to_bytes(8, "little") + b"a.", None),  # a string of a terabyte
        (endless(), "nested beyond measure"),
        (b"\x80\x02" + MODULE + b"q\x00}(X\x01\x00\x00\x00ah\x00X\x01\x00\x00\x00bh\x00ub.", "nested beyond measure"),
    ],
)
def test_hostile_archives_are_refused_within_little_memory(tmp_path, pickled, message):
    write_archive(tmp_path / "bad.pt", pickled)
    tracemalloc.start()
    if message is None:
        with contextlib.suppress(pickle.UnpicklingError, EOFError):
            assert read_torchscript_state_dict(tmp_path / "bad.pt") == {}
    else:
        with pytest.raises(pickle.UnpicklingError, match=message):
            read_torchscript_state_dict(tmp_path / "bad.pt")
    with pytest.raises(ValueError, match="is not a checkpoint of --backbone tiny-test") as caught:
        tiny(weights=tmp_path / "bad.pt")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert "\n" not in str(caught.value) and peak < 100e6


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
def test_compressed_records_and_storages_named_twice(tmp_path):
    model = save_archive(tmp_path / "good.pt", seed=7)
    with zipfile.ZipFile(tmp_path / "good.pt") as good:
        names = {name.partition("/")[2]: good.read(name) for name in good.namelist()}
    pickled = names.pop("data.pkl")
    names.pop("constants.pkl")
    write_archive(tmp_path / "packed.pt", pickled, names, zipfile.ZIP_DEFLATED)
    with pytest.raises(pickle.UnpicklingError, match="data.pkl is compressed, which torch never does"):
        read_torchscript_state_dict(tmp_path / "packed.pt")
    write_archive(tmp_path / "stored.pt", pickled, names)
    assert read_torchscript_state_dict(tmp_path / "stored.pt").keys() >= model.state_dict().keys()


@pytest.mark.parametrize("kind", [torch.tensor, int])
def test_openais_constants_in_a_plain_state_dict(tmp_path, kind):
    model = tiny_model(seed=7, quick_gelu=True)[0].eval()
    constants = {"input_resolution": kind(224), "context_length": kind(32), "vocab_size": kind(49408)}
    torch.save(model.state_dict() | constants, tmp_path / "plain.pt")
    with torch.no_grad():
        expected, _ = model.get_logits(images(), tiny_model()[1](PROMPTS.texts))
    # quick GELU, which the constants tell of
    torch.testing.assert_close(tiny(weights=tmp_path / "plain.pt")(images()), expected, atol=1e-5, rtol=0)


def test_weights_of_another_architecture_are_refused_in_one_line(tmp_path):
    torch.save(tiny_model(embed_dim=16)[0].state_dict(), tmp_path / "narrow.pt")
    torch.save({"conv.weight": torch.zeros(3)}, tmp_path / "foreign.pt")
    (tmp_path / "text.pt").write_text("not a checkpoint")
    for file, reason in (("narrow.pt", "size mismatch"), ("foreign.pt", "logit_scale"), ("text.pt", "")):
        message = f"{file} is not a checkpoint of --backbone tiny-test.*{reason}"
        with pytest.raises(ValueError, match=message) as caught:
            tiny(weights=tmp_path / file)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "weights", "error", "message"),
    [
        ("ViT-B32", "openai", ValueError, "closest: ViT-B-32"),
        ("ViT-B-32-quickgelu", "openia", ValueError, "did you mean 'openai'"),
        ("ViT-B-32-quickgelu", "no/such.pt", FileNotFoundError, "--weights no/such.pt: no such file"),
        ("convnext_tiny", None, ValueError, "needs --weights: none are published, pass a file"),
        ("tiny-test", None, ValueError, "or none for a smoke test"),
        ("ViT-H-14", None, ValueError, "needs --weights: one of laion2b_s32b_b79k, "),
    ],
)
def test_bad_names_give_one_line(name, weights, error, message):
    with pytest.raises(error, match=message) as caught:
        load_clip(name, weights)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["ViT-B-16-SigLIP", "ViT-B-16-SigLIP2", "mt5-base-ViT-B-32"])
def test_a_model_that_needs_an_absent_package_is_refused_by_name(monkeypatch, name):
    monkeypatch.setattr(clip.importlib.util, "find_spec", lambda package: None)
    with pytest.raises(ValueError, match=f"backbone '{name}' needs the package transformers: pip install"):
        load_clip(name, None)


def test_weights_that_cannot_be_had_are_named_with_their_address_and_flag(monkeypatch):
    def unreachable(*_, **__):
        raise OSError("no route\nto host")

    monkeypatch.setattr(clip_weights, "is_reachable", lambda url: False)
    monkeypatch.setattr(open_clip, "download_pretrained", unreachable)
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda *_: None)
    with pytest.raises(FileNotFoundError, match="no route.*/ViT-B-32.pt and pass --weights FILE") as caught:
        load_clip("ViT-B-32-quickgelu", None)
    assert "\n" not in str(caught.value)
    with pytest.raises(FileNotFoundError, match="laion/CLIP-ViT-H-14-laion2B-s32B-b79K/resolve"):
        load_clip("ViT-H-14", "laion2b_s32b_b79k")


@pytest.mark.parametrize(
    ("name", "tag", "mean", "resize_mode"),
    [
        ("ViT-B-32", "openai", open_clip.OPENAI_DATASET_MEAN, "shortest"),
        ("ViT-B-16-SigLIP", None, (0.5, 0.5, 0.5), "squash"),
        ("ViT-L-14", "laion2b_s32b_b82k", (0.5, 0.5, 0.5), "shortest"),
        ("ViT-L-14", None, open_clip.OPENAI_DATASET_MEAN, "shortest"),  # they disagree: as most are
    ],
)
def test_preprocessing_is_that_of_the_weights(name, tag, mean, resize_mode):
    published = open_clip.get_pretrained_cfg(name, tag) if tag else {}
    preprocessing = clip._preprocessing(name, published)
    assert preprocessing["mean"] == mean and preprocessing["resize_mode"] == resize_mode


@pytest.mark.parametrize("name", ["RN50", "ViT-B-16", "convnext_base", "coca_ViT-B-32", "EVA02-B-16"])
def test_every_family_is_built_as_open_clip_builds_it(name):
    with torch.device("meta"):
        ours, _ = clip._build(name, clip._look_up(name), 0)
        theirs = open_clip.create_model(name, load_weights=False, device="meta")
    assert type(ours) is type(theirs) and repr(ours) == repr(theirs)
    shapes = [{key: value.shape for key, value in model.state_dict().items()} for model in (ours, theirs)]
    assert shapes[0] == shapes[1]


@pytest.mark.soak
@pytest.mark.filterwarnings("ignore:flowers102 has")
@pytest.mark.skipif(
    not (os.environ.get("BLM_REAL_DATA") and os.environ.get("BLM_REAL_WEIGHTS")),
    reason="needs BLM_REAL_DATA (folder holding flowers102) and BLM_REAL_WEIGHTS (tf_efficientnet_lite0.pth)",
)
def test_a_clip_with_meaning_beats_chance_on_real_flowers_without_training(tmp_path):
    chosen = range(10, 30)  # 20 classes with 10 test images each: chance is 0.05
    task = load_task(
        "flowers102", os.environ["BLM_REAL_DATA"], clip_preset(224), clip_preset(224), cache_path=tmp_path,
        progress=False,
    )  # fmt: skip
    prompts = build_prompts([task.class_names[label] for label in chosen])
    backbone = build_classifier("efficientnet_lite0", os.environ["BLM_REAL_WEIGHTS"])
    classifier = build_meaningful_clip(backbone, prompts.class_names).classifier(prompts)
    rows = [i for i, label in enumerate(task.test.labels.tolist()) if label in chosen]
    labels = task.test.labels[rows] - chosen[0]
    correct = dict.fromkeys(("single", "ensemble"), 0)
    mean, std = (torch.tensor(value).view(3, 1, 1) for value in (classifier.mean, classifier.std))
    for batch, label in zip(torch.tensor(rows).split(50), labels.split(50), strict=True):
        pixels = task.test.images[batch].permute(0, 3, 1, 2).float() / 255
        for kind, logits in classifier.zero_shot_logits((pixels - mean) / std).items():
            correct[kind] += (logits.argmax(dim=1) == label).sum().item()
    assert len(rows) == 200
    assert correct["single"] == pytest.approx(23, abs=4) and correct["ensemble"] == pytest.approx(23, abs=4)


@pytest.mark.soak
@pytest.mark.filterwarnings("ignore:flowers102 has")
@pytest.mark.skipif(
    not (os.environ.get("BLM_REAL_DATA") and os.environ.get("BLM_REAL_WEIGHTS")),
    reason="needs BLM_REAL_DATA (folder holding flowers102) and BLM_REAL_WEIGHTS (tf_efficientnet_lite0.pth)",
)
def test_a_clip_with_meaning_learns_real_flowers(tmp_path, monkeypatch):
    """train_vlm.py itself, but for the model: BLM and BLM+ end above ILM, and above the model as it comes."""
    import train_vlm

    names = write_flowers_subset(tmp_path / "flowers102", range(10, 30))
    backbone = build_classifier("efficientnet_lite0", os.environ["BLM_REAL_WEIGHTS"])
    monkeypatch.setattr("tools.training.build.load_clip", lambda *_: build_meaningful_clip(backbone, names))
    results = {}
    for mapping in ("ilm", "blm", "blmpp"):
        results[mapping] = train_vlm.main([
            "--dataset", "flowers102", "--data-path", str(tmp_path), "--mapping", mapping, "--backbone", "meaningful",
            "--epochs", "6", "--batch-size", "64", "--results-path", str(tmp_path / "results"),
        ])  # fmt: skip
    accuracy = {mapping: result["final_accuracy"] for mapping, result in results.items()}
    print(accuracy, results["ilm"]["zero_shot"])
    assert results["ilm"]["zero_shot"]["single"] > 2 / 20
    assert accuracy["blm"] > accuracy["ilm"] and accuracy["blmpp"] > accuracy["ilm"]
    assert min(accuracy.values()) > results["ilm"]["zero_shot"]["ensemble"]
