"""Names, paths and hub ids; the hub itself is a cache laid out on disk and a refused connection."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from triptych.errors import CheckpointError
from triptych.weights import export, load
from triptych.weights import hub as zoo
from triptych.weights.hub import locate

LOAD = """
import sys
from triptych.errors import CheckpointError
from triptych.weights import load
for source in sys.argv[1:]:
    try:
        net = load(source)
    except CheckpointError as problem:
        print("CheckpointError:", problem)
    else:
        print("loaded", getattr(net.config, "embed_dim", type(net).__name__), net.card.classes)
"""
REFUSED = (
    "CheckpointError: no file or folder {}, the hub cannot be reached for it and its cache lacks it; "
    "connect, or give a file"
)


def lay_out(home: Path, repo: str, folder: Path, revision: str = "main") -> None:
    """A hub cache as huggingface_hub leaves it: refs, and a snapshot by commit."""
    commit = "0123456789abcdef0123456789abcdef01234567"
    base = home / "hub" / f"models--{repo.replace('/', '--')}"
    (base / "refs").mkdir(parents=True)
    (base / "refs" / revision).write_text(commit)
    snapshot = base / "snapshots" / commit
    snapshot.mkdir(parents=True)
    for file in folder.rglob("*"):
        if file.is_file():
            (snapshot / file.relative_to(folder)).parent.mkdir(parents=True, exist_ok=True)
            (snapshot / file.relative_to(folder)).write_bytes(file.read_bytes())


@pytest.mark.parametrize("offline", [True, False])
def test_the_hub_from_its_cache_and_refused(tiny, tiny_ldm, tmp_path, offline):
    """A fresh process whose hub is a closed port: what is cached loads, the rest is one clear line each."""
    net = tiny(num_classes=2)
    net.card = net.card.__class__(classes=("cat", "dog"))
    for form in ("hf", "timm"):
        export(net, tmp_path / form, form)
        lay_out(tmp_path / "home", f"someone/{form}", tmp_path / form)
    lay_out(tmp_path / "home", "someone/old", tmp_path / "hf", revision="v2")
    export(tiny_ldm("ldm-celeba"), tmp_path / "pipeline", "diffusers")
    lay_out(tmp_path / "home", "someone/pipeline", tmp_path / "pipeline")
    for weights in (tmp_path / "pipeline").rglob("*.safetensors"):
        weights.unlink()
    lay_out(tmp_path / "home", "someone/empty", tmp_path / "pipeline")
    env = {k: v for k, v in os.environ.items() if not k.startswith("HF_")}
    env |= {"HF_HOME": str(tmp_path / "home"), "HF_ENDPOINT": "http://127.0.0.1:9"}
    env |= {"HF_HUB_OFFLINE": "1"} if offline else {}
    requested = ["someone/hf", "someone/timm", "someone/old@v2", "someone/old", "no-one/nothing"]
    requested += ["someone/pipeline", "someone/empty"]
    command = [sys.executable, "-W", "error", "-c", LOAD, *requested]
    done = subprocess.run(
        command, env=env, capture_output=True, text=True, timeout=120, check=True, cwd=tmp_path
    )
    loaded = "loaded 64 ('cat', 'dog')"
    refused = [REFUSED.format(name) for name in ("someone/old", "no-one/nothing")]
    pipeline = ["loaded LatentDiffusion None", REFUSED.format("someone/empty")]
    assert done.stdout.splitlines() == [loaded, loaded, loaded, *refused, *pipeline]


def test_paths_never_touch_the_network(tmp_path, monkeypatch):
    monkeypatch.setattr(zoo, "_from_hub", lambda text: pytest.fail(f"asked the hub for {text}"))
    existing = tmp_path / "owner" / "name"
    existing.mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert locate("owner/name") == Path("owner/name")
    for source in (Path("a/b"), "./a/b", "/a/b", "a/b.pth", "a/b.safetensors", "a/b/c", "~/a", "name"):
        with pytest.raises(CheckpointError, match="no file or folder"):
            locate(source)


def test_hub_ids(monkeypatch):
    monkeypatch.setattr(zoo, "_from_hub", lambda text: Path("hub") / text)
    assert locate("google/vit-base-patch16-224") == Path("hub/google/vit-base-patch16-224")
    assert locate("hf-hub:timm/vit_tiny.augreg@main") == Path("hub/timm/vit_tiny.augreg@main")


def test_shipped_names(tmp_path, monkeypatch):
    monkeypatch.setattr(zoo, "files", lambda package: tmp_path)
    with pytest.raises(CheckpointError, match="'vit-emoji' is missing"):
        locate("vit-emoji")
    (tmp_path / "assets").mkdir()
    (tmp_path / "assets" / "vit_emoji.safetensors").touch()
    assert locate("vit-emoji").name == "vit_emoji.safetensors"


def test_what_the_hub_answers(monkeypatch):
    """Its errors, by kind, as one line each."""
    hub = pytest.importorskip("huggingface_hub")
    from huggingface_hub import errors

    def raiser(variant):
        def download(*_, **__):
            problem = variant.__new__(variant)
            Exception.__init__(problem, "first line\nsecond line")
            raise problem

        return download

    for variant, part in (
        (errors.GatedRepoError, "is gated; accept its license"),
        (errors.RepositoryNotFoundError, "the hub has no model a/b"),
        (errors.RevisionNotFoundError, "has no revision 'r'"),
        (errors.HfHubHTTPError, "the hub refused a/b"),
        (errors.LocalEntryNotFoundError, "cannot be reached"),
        (ConnectionError, "cannot be reached"),
    ):
        monkeypatch.setattr(hub, "snapshot_download", raiser(variant))
        with pytest.raises(CheckpointError, match=part) as caught:
            locate("a/b@r")
        assert "\n" not in str(caught.value)


def test_a_repository_without_weights(tmp_path, monkeypatch):
    hub = pytest.importorskip("huggingface_hub")
    monkeypatch.setattr(hub, "snapshot_download", lambda *_, **__: str(tmp_path))
    with pytest.raises(CheckpointError, match="holds no checkpoint"):
        locate("a/b")


INDEX = {
    "_class_name": "StableDiffusionPipeline",
    "unet": ["diffusers", "UNet2DConditionModel"],
    "vae": ["diffusers", "AutoencoderKL"],
    "text_encoder": ["transformers", "CLIPTextModel"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "scheduler": ["diffusers", "PNDMScheduler"],
    "safety_checker": ["stable_diffusion", "StableDiffusionSafetyChecker"],
    "image_encoder": [None, None],
}
REPOSITORY = """
    README.md model_index.json v1-5-pruned.ckpt v1-5-pruned-emaonly.safetensors
    safety_checker/config.json safety_checker/model.safetensors
    scheduler/scheduler_config.json
    text_encoder/config.json text_encoder/model.safetensors text_encoder/model.fp16.safetensors
    text_encoder/pytorch_model.bin
    tokenizer/vocab.json tokenizer/merges.txt tokenizer/tokenizer_config.json
    unet/config.json unet/diffusion_pytorch_model.bin unet/diffusion_pytorch_model.fp16.bin
    unet/diffusion_pytorch_model.fp16.safetensors unet/diffusion_pytorch_model.non_ema.safetensors
    vae/config.json vae/diffusion_pytorch_model.safetensors.index.json
    vae/diffusion_pytorch_model-00001-of-00002.safetensors vae/diffusion_pytorch_model-00002-of-00002.safetensors
    vae/diffusion_pytorch_model.fp16.safetensors vae/onnx/model.onnx
"""
NEEDED = """
    model_index.json scheduler/scheduler_config.json text_encoder/config.json text_encoder/model.safetensors
    tokenizer/vocab.json tokenizer/merges.txt tokenizer/tokenizer_config.json
    unet/config.json unet/diffusion_pytorch_model.fp16.safetensors
    vae/config.json vae/diffusion_pytorch_model.safetensors.index.json
    vae/diffusion_pytorch_model-00001-of-00002.safetensors vae/diffusion_pytorch_model-00002-of-00002.safetensors
"""


def test_of_a_pipeline_no_more_is_fetched_than_is_read(tmp_path, monkeypatch):
    hub = pytest.importorskip("huggingface_hub")
    requested = []

    def download(repo, revision, allow_patterns):
        requested.append((repo, revision, allow_patterns))
        (tmp_path / "model_index.json").write_text(json.dumps(INDEX))
        return str(tmp_path)

    monkeypatch.setattr(hub, "snapshot_download", download)
    monkeypatch.setattr(hub, "list_repo_files", lambda repo, revision: REPOSITORY.split())
    assert locate("a/b@r") == tmp_path
    assert [one[:2] for one in requested] == [("a/b", "r")] * 2
    assert not any("*" in pattern and "-of-" not in pattern for pattern in requested[0][2])
    assert sorted(requested[1][2]) == sorted(NEEDED.split())
    pickled = [name for name in REPOSITORY.split() if not name.endswith(".safetensors")]
    assert "unet/diffusion_pytorch_model.bin" in zoo.pipeline_files(pickled, INDEX)
    assert "unet/diffusion_pytorch_model.fp16.bin" not in zoo.pipeline_files(pickled, INDEX)
    (tmp_path / "model_index.json").write_text("[")
    monkeypatch.setattr(hub, "snapshot_download", lambda *_, **__: str(tmp_path))
    with pytest.raises(CheckpointError, match="is not JSON"):
        locate("a/b")


def test_halves_of_a_folder(tiny_ldm, same_state, tmp_path):
    """The names of the fp16 variant, whole and in shards, in a folder that has no others."""
    net = tiny_ldm("ldm-celeba").half()
    export(net, tmp_path / "it", "diffusers")
    full = tmp_path / "it" / "vqvae" / "diffusion_pytorch_model.safetensors"
    full.rename(full.with_name("diffusion_pytorch_model.fp16.safetensors"))
    full = tmp_path / "it" / "unet" / "diffusion_pytorch_model.safetensors"
    tensors, places = load_file(full), {}
    for k in range(2):
        name = f"diffusion_pytorch_model.fp16-0000{k + 1}-of-00002.safetensors"
        part = dict(list(tensors.items())[k::2])
        save_file(part, full.with_name(name))
        places |= dict.fromkeys(part, name)
    index = full.with_name("diffusion_pytorch_model.safetensors.index.fp16.json")
    index.write_text(json.dumps({"weight_map": places}))
    full.unlink()
    back = load(tmp_path / "it")
    same_state(net, back)
    (full.with_name("diffusion_pytorch_model.fp16-00002-of-00002.safetensors")).unlink()
    with pytest.raises(CheckpointError, match="lacks 1 of 2 shards"):
        load(tmp_path / "it")
