"""Sources: what a name means, which file comes from where, and each failure by its own class. No network is used."""

import json
import logging
import types
from pathlib import Path

import fsspec
import huggingface_hub
import pytest
from huggingface_hub import constants, errors

from qscope_jax.files import hub, source
from qscope_jax.files.source import Source, resolve

REPO = "Qwen/SAE-Res-Qwen3-1.7B-Base-W32K-L0_50"
NAME = REPO.split("/")[1]
OLD, NEW = "a" * 40, "b" * 40


def response(status: int, headers: dict[str, str] | None = None):
    return types.SimpleNamespace(status_code=status, headers=headers or {}, request=None)


def http(kind: type[errors.HfHubHTTPError], status: int, headers: dict[str, str] | None = None):
    return kind(f"{status} Client Error", response=response(status, headers))  # pyright: ignore[reportArgumentType]


class FakeHub:
    """Stands for the hub: answers `model_info` and `hf_hub_download` and keeps the real cache layout."""

    def __init__(self, cache: Path):
        self.cache, self.head, self.downloads, self.waits = cache, NEW, [], []
        self.files = {"config.json": "{}", "layer0.sae.pt": "zero", "layer20.sae.pt": "twenty"}
        self.info_error: list[Exception] = []
        self.download_error: list[Exception] = []

    def model_info(self, repo, *, revision, timeout):
        if self.info_error:
            raise self.info_error.pop(0)
        siblings = [types.SimpleNamespace(rfilename=name) for name in self.files]
        return types.SimpleNamespace(sha=OLD if revision == "v1" else self.head, siblings=siblings)

    def hf_hub_download(self, repo, name, *, revision):
        if self.download_error:
            raise self.download_error.pop(0)
        commit = {"main": self.head, "v1": OLD}.get(revision, revision)
        self.downloads.append((name, revision))
        return str(put(self.cache, commit, name, self.files[name], ref=None if revision == commit else revision))


def put(cache: Path, commit: str, name: str, text: str, ref: str | None = None) -> Path:
    folder = cache / f"models--{REPO.replace('/', '--')}"
    path = folder / "snapshots" / commit / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    if ref:
        (folder / "refs").mkdir(exist_ok=True)
        (folder / "refs" / ref).write_text(commit, encoding="utf-8")
    return path


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(huggingface_hub, "is_offline_mode", lambda: False)
    return tmp_path / "cache"


@pytest.fixture
def remote(cache, monkeypatch):
    fake = FakeHub(cache)
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: fake)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", fake.hf_hub_download)
    monkeypatch.setattr(hub.time, "sleep", fake.waits.append)
    return fake


@pytest.fixture
def offline(cache, monkeypatch):
    def asked(*_, **__):
        raise AssertionError("the network was asked")

    monkeypatch.setattr(huggingface_hub, "is_offline_mode", lambda: True)
    monkeypatch.setattr(huggingface_hub, "HfApi", asked)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", asked)
    return cache


# --- the hub ---


def test_a_hub_source_names_its_commit_and_downloads_only_what_is_asked_for(remote):
    found = resolve(REPO, what="sae")
    assert (found.kind, found.name, found.revision, found.file) == ("hub", NAME, NEW, None)
    assert found.names() == ("config.json", "layer0.sae.pt", "layer20.sae.pt")
    assert found.has("layer20.sae.pt")
    assert not found.has("layer21.sae.pt")
    assert remote.downloads == []
    assert found.fetch("layer20.sae.pt").read_text() == "twenty"
    assert [name for name, _ in remote.downloads] == ["layer20.sae.pt"]


def test_a_revision_is_used_and_may_hold_slashes(remote):
    assert resolve(f"{REPO}@v1", what="sae").revision == OLD
    assert resolve(f"hf://{REPO}@refs/pr/3", what="sae").revision == NEW


def test_every_file_comes_from_one_commit_even_when_main_moves(remote):
    found = resolve(REPO, what="sae")
    remote.head = OLD
    path = found.fetch("config.json")
    assert NEW in path.parts
    assert remote.downloads == [("config.json", "main"), ("config.json", NEW)]


def test_what_was_downloaded_online_is_there_offline(remote, monkeypatch):
    resolve(REPO, what="sae").fetch("layer0.sae.pt")
    monkeypatch.setattr(huggingface_hub, "is_offline_mode", lambda: True)
    found = resolve(REPO, what="sae")
    assert found.revision == NEW
    assert found.names() == ("layer0.sae.pt",)
    assert found.fetch("layer0.sae.pt").read_text() == "zero"
    assert "offline" in str(found)


def test_offline_says_which_file_the_cache_lacks_and_how_to_get_it(offline):
    put(offline, NEW, "layer0.sae.pt", "zero", ref="main")
    found = resolve(REPO, what="sae")
    with pytest.raises(source.OfflineError, match=rf"hf download {REPO} layer20.sae.pt --revision {NEW}"):
        found.fetch("layer20.sae.pt")


def test_offline_without_a_cache_and_with_another_revision(offline):
    with pytest.raises(source.OfflineError, match="HF_HUB_OFFLINE"):
        resolve(REPO, what="sae")
    put(offline, OLD, "config.json", "{}", ref="v1")
    with pytest.raises(source.OfflineError, match=f"The cache holds: {REPO}@{OLD}"):
        resolve(REPO, what="sae")
    assert resolve(f"{REPO}@{OLD}", what="sae").revision == OLD
    assert resolve(f"{REPO}@v1", what="sae").revision == OLD


def test_a_hub_that_does_not_answer_leaves_the_cache_and_says_so(remote, caplog):
    put(remote.cache, OLD, "config.json", "{}", ref="main")
    remote.info_error = [hub._transport()("name or service not known")]
    with caplog.at_level(logging.WARNING):
        assert resolve(REPO, what="sae").revision == OLD
    assert "Using the cached commit" in caplog.text


FAILURES = [
    (lambda: http(errors.GatedRepoError, 403), source.AccessError, "gated: accept its terms at"),
    (lambda: http(errors.RepositoryNotFoundError, 401), source.SourceNotFoundError, "not a repository on the hub"),
    (lambda: http(errors.RevisionNotFoundError, 404), source.RevisionError, "no revision 'main'"),
    (lambda: http(errors.HfHubHTTPError, 401), source.AccessError, "renew HF_TOKEN"),
    (lambda: http(errors.HfHubHTTPError, 503), source.OfflineError, "not in the local cache"),
    (lambda: hub._transport()("connection refused"), source.OfflineError, "not in the local cache"),
    (lambda: ConnectionResetError("reset"), source.OfflineError, "not in the local cache"),
    (lambda: http(errors.HfHubHTTPError, 418), source.SourceError, "could not be read from the hub"),
]


@pytest.mark.parametrize(("failure", "kind", "told"), FAILURES)
def test_failures_of_the_listing_are_told_apart(remote, failure, kind, told):
    remote.info_error = [failure()]
    with pytest.raises(kind, match=told) as caught:
        resolve(REPO, what="sae")
    assert type(caught.value) is kind
    assert REPO in str(caught.value)


@pytest.mark.parametrize(
    ("failure", "kind", "told"),
    [
        (lambda: http(errors.GatedRepoError, 403), source.AccessError, "gated"),
        (lambda: errors.LocalEntryNotFoundError("no connection"), source.OfflineError, "does not answer"),
        (lambda: http(errors.RemoteEntryNotFoundError, 404), source.SourceNotFoundError, "no file 'config.json'"),
        (lambda: OSError(28, "No space left on device"), source.SourceError, "No space left"),
    ],
)
def test_failures_of_a_download_are_told_apart(remote, failure, kind, told):
    found = resolve(REPO, what="sae")
    remote.download_error = [failure()]
    with pytest.raises(kind, match=told) as caught:
        found.fetch("config.json")
    assert type(caught.value) is kind


def test_too_many_requests_are_waited_out_a_bounded_number_of_times(remote):
    limit = lambda: http(errors.HfHubHTTPError, 429, {"Retry-After": "7"})  # noqa: E731
    remote.info_error = [limit(), limit()]
    assert resolve(REPO, what="sae").revision == NEW
    assert remote.waits == [7.0, 7.0]
    remote.info_error = [http(errors.HfHubHTTPError, 429, {"Retry-After": "9999"}) for _ in range(50)]
    with pytest.raises(source.OfflineError, match="it limits requests"):
        resolve(REPO, what="sae")
    assert len(remote.info_error) == 50 - hub._ATTEMPTS
    assert max(remote.waits) == hub._LONGEST_WAIT


def test_too_many_requests_during_a_download(remote):
    def wrapped():
        error = errors.LocalEntryNotFoundError("cannot find the file in the cache")
        error.__cause__ = http(errors.HfHubHTTPError, 429)
        return error

    found = resolve(REPO, what="sae")
    remote.download_error = [wrapped()]
    assert found.fetch("config.json").is_file()
    assert remote.waits == [1.0]
    remote.download_error = [wrapped() for _ in range(50)]
    with pytest.raises(source.RateLimitError, match="429"):
        found.fetch("config.json")


# --- what is meant as a path ---


@pytest.mark.parametrize(
    "text",
    ["./x/y", "../x", "/nowhere/x", "~/nowhere-at-all", "a/b/c", "x/layer20.sae.pt", "models/", "here/typo", "a\\b"],
)
def test_a_missing_path_never_becomes_a_question_to_the_hub(offline, text):
    Path("here").mkdir()
    with pytest.raises(source.SourceNotFoundError, match="no such folder or file"):
        resolve(text, what="model")


def test_a_path_object_is_always_a_path(offline):
    with pytest.raises(source.SourceNotFoundError, match="no such folder or file"):
        resolve(Path("owner/name"), what="model")


def test_an_existing_owner_folder_is_explained(offline):
    Path("Qwen").mkdir()
    with pytest.raises(source.SourceNotFoundError, match=f"for the hub write hf://{REPO}"):
        resolve(REPO, what="sae")


def test_words_that_are_nothing(offline):
    for text in ("gpt2", "", "owner/name@", "owner/name@../../x"):
        with pytest.raises(source.SourceNotFoundError):
            resolve(text, what="model")


def test_an_existing_folder_wins_over_the_hub(offline):
    Path(REPO).mkdir(parents=True)
    assert resolve(REPO, what="sae").kind == "folder"


# --- local places ---


def test_demo_is_the_embedded_one_and_needs_no_network(offline, monkeypatch):
    Path("demo").mkdir()
    root = Path(source.__file__).parents[1] / "assets"
    monkeypatch.setattr(source, "__file__", str(Path.cwd() / "package" / "files" / "source.py"))
    with pytest.raises(source.SourceNotFoundError, match="install qscope-jax again"):
        resolve("demo", what="sae")
    Path("package/assets/sae").mkdir(parents=True)
    Path("package/assets/sae/layer0.sae.pt").touch()
    found = resolve("demo", what="sae")
    assert (found.kind, found.names()) == ("demo", ("layer0.sae.pt",))
    assert resolve("./demo", what="sae").kind == "folder"
    assert root.name == "assets"


def test_a_folder_lists_nested_and_not_hidden_files(offline):
    for name in ("config.json", "blocks.1/sae.safetensors", ".git/config", ".hidden"):
        Path("plain-W32K-L0_50.v2", name).parent.mkdir(parents=True, exist_ok=True)
        Path("plain-W32K-L0_50.v2", name).touch()
    found = resolve("plain-W32K-L0_50.v2", what="sae")
    assert (found.kind, found.name, found.revision) == ("folder", "plain-W32K-L0_50.v2", None)
    assert found.names() == ("blocks.1/sae.safetensors", "config.json")
    with pytest.raises(source.SourceNotFoundError, match=r"did you mean config\.json"):
        found.fetch("confg.json")


def test_a_hub_cache_folder_its_snapshot_and_one_file_of_it_keep_the_repository_name(offline):
    file = put(offline, OLD, "layer3.sae.pt", "three", ref="main")
    folder = file.parents[2]
    for spec, kind in ((folder, "folder"), (file.parent, "folder"), (file, "file")):
        found = resolve(spec, what="sae")
        assert (found.kind, found.name, found.revision) == (kind, NAME, OLD)
        assert found.fetch("layer3.sae.pt").read_text() == "three"


def test_a_cache_with_several_snapshots_or_none_asks_which(offline):
    first = put(offline, OLD, "config.json", "{}")
    assert resolve(first.parents[2], what="sae").revision == OLD
    put(offline, NEW, "config.json", "{}")
    with pytest.raises(source.SourceError, match="holds 2 snapshots"):
        resolve(first.parents[2], what="sae")
    (offline / "models--a--b").mkdir()
    with pytest.raises(source.SourceNotFoundError, match="never finished"):
        resolve(offline / "models--a--b", what="sae")
    with pytest.raises(source.SourceError, match="whole hub cache"):
        resolve(offline, what="sae")


def test_a_broken_link_of_a_cut_cache_is_named(offline):
    file = put(offline, OLD, "layer3.sae.pt", "three", ref="main")
    file.unlink()
    file.symlink_to(offline / "gone")
    with pytest.raises(source.SourceNotFoundError, match="broken link"):
        resolve(file.parent, what="sae").fetch("layer3.sae.pt")


def test_modelscope_writes_dots_as_underscores(offline):
    Path("hub/Qwen/Qwen3-1___7B-Base").mkdir(parents=True)
    assert resolve("hub/Qwen/Qwen3-1___7B-Base", what="model").name == "Qwen3-1.7B-Base"


def test_one_file_is_only_that_file(offline):
    Path("box").mkdir()
    for name in ("layer20.sae.pt", "layer19.sae.pt"):
        Path("box", name).touch()
    found = resolve("box/layer20.sae.pt", what="sae")
    assert (found.kind, found.name, found.file, found.names()) == ("file", "box", "layer20.sae.pt", ("layer20.sae.pt",))
    assert not found.has("layer19.sae.pt")
    with pytest.raises(source.SourceNotFoundError):
        found.fetch("layer19.sae.pt")


@pytest.mark.parametrize(
    "name", ["../secret", "a/../../secret", "/etc/hosts", "", "..", "a\\..\\b", "C:/x", "a\0b", "."]
)
def test_names_that_leave_the_source_are_refused_everywhere(remote, name):
    Path("box").mkdir()
    Path("secret").touch()
    with fsspec.filesystem("memory").open("memory://box-unsafe/config.json", "w") as file:
        json.dump({}, file)
    for found in (
        resolve("./box", what="model"),
        resolve(REPO, what="sae"),
        resolve("memory://box-unsafe", what="sae"),
    ):
        assert isinstance(found, Source)
        with pytest.raises(source.UnsafeNameError, match="is not a file name inside a source"):
            found.fetch(name)
        with pytest.raises(source.UnsafeNameError):
            found.has(name)


# --- remote folders ---


@pytest.fixture
def bucket(tmp_path, monkeypatch):
    monkeypatch.setenv("QSCOPE_CACHE", str(tmp_path / "copies"))
    memory = fsspec.filesystem("memory")
    root = f"/{tmp_path.name}/SAE-W32K-L0_50"
    for name in ("config.json", "deep/layer1.safetensors"):
        memory.pipe(f"{root}/{name}", name.encode())
    yield f"memory:/{root}"
    memory.rm(f"/{tmp_path.name}", recursive=True)


def test_a_remote_folder_is_copied_file_by_file(bucket, tmp_path):
    found = resolve(bucket + "/", what="sae")
    assert (found.kind, found.name, found.file) == ("remote", "SAE-W32K-L0_50", None)
    assert found.names() == ("config.json", "deep/layer1.safetensors")
    assert not (tmp_path / "copies").exists()
    assert found.fetch("deep/layer1.safetensors").read_text() == "deep/layer1.safetensors"
    assert not list(tmp_path.rglob("config.json"))


def test_a_remote_copy_is_reused_until_the_remote_file_changes(bucket, monkeypatch):
    found = resolve(bucket, what="sae")
    system, copies = fsspec.filesystem("memory"), []
    real = type(system).get_file
    monkeypatch.setattr(type(system), "get_file", lambda self, *a, **k: (copies.append(a[0]), real(self, *a, **k))[1])
    first = found.fetch("config.json")
    assert found.fetch("config.json") == first
    assert len(copies) == 1
    system.pipe(bucket.removeprefix("memory:/") + "/config.json", b"newer text")
    assert found.fetch("config.json").read_text() == "newer text"
    assert len(copies) == 2


def test_one_remote_file_and_what_is_not_there(bucket):
    found = resolve(f"{bucket}/config.json", what="sae")
    assert (found.file, found.name, found.names()) == ("config.json", "SAE-W32K-L0_50", ("config.json",))
    with pytest.raises(source.SourceNotFoundError, match="does not exist or is empty"):
        resolve(bucket + "-typo", what="sae")
    with pytest.raises(source.SourceNotFoundError, match="has no file"):
        resolve(bucket, what="sae").fetch("model.safetensors")
    with pytest.raises(source.SourceError, match="nothing-knows:// is not an address"):
        resolve("nothing-knows://bucket/x", what="sae")


@pytest.mark.parametrize(
    ("failure", "kind"),
    [
        (PermissionError("403"), source.AccessError),
        (TimeoutError("slow"), source.OfflineError),
        (RuntimeError("no credentials"), source.SourceError),
    ],
)
def test_remote_failures_are_told_apart(bucket, monkeypatch, failure, kind):
    def broken(*_, **__):
        raise failure

    with monkeypatch.context() as patched:
        patched.setattr(type(fsspec.filesystem("memory")), "find", broken)
        with pytest.raises(kind) as caught:
            resolve(bucket, what="sae")
    assert type(caught.value) is kind
    assert bucket in str(caught.value)
