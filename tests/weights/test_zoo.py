"""Names, paths and hub ids; the hub itself is a cache laid out on disk and a refused connection."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from triptych.errors import UserError
from triptych.weights import export, zoo
from triptych.weights.zoo import locate

LOAD = """
import sys
from triptych.errors import UserError
from triptych.weights import load
for source in sys.argv[1:]:
    try:
        net = load(source)
    except UserError as problem:
        print("UserError:", problem)
    else:
        print("loaded", net.config.embed_dim, net.card.classes)
"""
REFUSED = (
    "UserError: no file or folder {}, the hub cannot be reached for it and its cache lacks it; "
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
    for file in folder.iterdir():
        (snapshot / file.name).write_bytes(file.read_bytes())


@pytest.mark.parametrize("offline", [True, False])
def test_the_hub_from_its_cache_and_refused(tiny, tmp_path, offline):
    """A fresh process whose hub is a closed port: what is cached loads, the rest is one clear line each."""
    net = tiny(num_classes=2)
    net.card = net.card.__class__(classes=("cat", "dog"))
    for form in ("hf", "timm"):
        export(net, tmp_path / form, form)
        lay_out(tmp_path / "home", f"somebody/{form}", tmp_path / form)
    lay_out(tmp_path / "home", "somebody/old", tmp_path / "hf", revision="v2")
    env = {k: v for k, v in os.environ.items() if not k.startswith("HF_")}
    env |= {"HF_HOME": str(tmp_path / "home"), "HF_ENDPOINT": "http://127.0.0.1:9"}
    env |= {"HF_HUB_OFFLINE": "1"} if offline else {}
    asked = ["somebody/hf", "somebody/timm", "somebody/old@v2", "somebody/old", "nobody/nothing"]
    command = [sys.executable, "-W", "error", "-c", LOAD, *asked]
    done = subprocess.run(
        command, env=env, capture_output=True, text=True, timeout=120, check=True, cwd=tmp_path
    )
    loaded = "loaded 64 ('cat', 'dog')"
    refused = [REFUSED.format(name) for name in ("somebody/old", "nobody/nothing")]
    assert done.stdout.splitlines() == [loaded, loaded, loaded, *refused]


def test_paths_never_touch_the_network(tmp_path, monkeypatch):
    monkeypatch.setattr(zoo, "_from_hub", lambda text: pytest.fail(f"asked the hub for {text}"))
    existing = tmp_path / "owner" / "name"
    existing.mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert locate("owner/name") == Path("owner/name")
    for source in (Path("a/b"), "./a/b", "/a/b", "a/b.pth", "a/b.safetensors", "a/b/c", "~/a", "name"):
        with pytest.raises(UserError, match="no file or folder"):
            locate(source)


def test_hub_ids(monkeypatch):
    monkeypatch.setattr(zoo, "_from_hub", lambda text: Path("hub") / text)
    assert locate("google/vit-base-patch16-224") == Path("hub/google/vit-base-patch16-224")
    assert locate("hf-hub:timm/vit_tiny.augreg@main") == Path("hub/timm/vit_tiny.augreg@main")


def test_shipped_names(tmp_path, monkeypatch):
    monkeypatch.setattr(zoo, "files", lambda package: tmp_path)
    with pytest.raises(UserError, match="'vit-emoji' is missing"):
        locate("vit-emoji")
    (tmp_path / "assets").mkdir()
    (tmp_path / "assets" / "vit_emoji.safetensors").touch()
    assert locate("vit-emoji").name == "vit_emoji.safetensors"


def test_what_the_hub_answers(monkeypatch):
    """Its errors, by kind, as one line each."""
    hub = pytest.importorskip("huggingface_hub")
    from huggingface_hub import errors

    def raiser(kind):
        def download(*_, **__):
            problem = kind.__new__(kind)
            Exception.__init__(problem, "first line\nsecond line")
            raise problem

        return download

    for kind, part in (
        (errors.GatedRepoError, "is gated; accept its licence"),
        (errors.RepositoryNotFoundError, "the hub has no model a/b"),
        (errors.RevisionNotFoundError, "has no revision 'r'"),
        (errors.HfHubHTTPError, "the hub refused a/b"),
        (errors.LocalEntryNotFoundError, "cannot be reached"),
        (ConnectionError, "cannot be reached"),
    ):
        monkeypatch.setattr(hub, "snapshot_download", raiser(kind))
        with pytest.raises(UserError, match=part) as caught:
            locate("a/b@r")
        assert "\n" not in str(caught.value)


def test_a_repository_without_weights(tmp_path, monkeypatch):
    hub = pytest.importorskip("huggingface_hub")
    monkeypatch.setattr(hub, "snapshot_download", lambda *_, **__: str(tmp_path))
    with pytest.raises(UserError, match="holds no checkpoint"):
        locate("a/b")
