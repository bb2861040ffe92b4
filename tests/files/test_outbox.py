"""Results for a remote folder arrive file by file, whole or not at all, and are lost nowhere."""

import fsspec
import pytest

from qscope_jax.files.errors import AccessError, SourceError
from qscope_jax.files.outbox import locate, open_outbox

MEMORY = fsspec.filesystem("memory")


@pytest.fixture
def box(tmp_path, monkeypatch):
    monkeypatch.setenv("QSCOPE_CACHE", str(tmp_path / "cache"))
    yield open_outbox(f"memory://{tmp_path.name}/results")
    if MEMORY.exists(f"/{tmp_path.name}"):
        MEMORY.rm(f"/{tmp_path.name}", recursive=True)


def write(box, **files):
    for name, text in files.items():
        path = box.folder / name.replace("__", "/").replace("_", ".")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def there(box) -> dict[str, str]:
    """Everything at the address, hidden files too."""
    found = MEMORY.find(box.root) if MEMORY.exists(box.root) else []
    return {path.removeprefix(box.root + "/"): MEMORY.cat_file(path).decode() for path in found}


@pytest.mark.parametrize(
    ("given", "place"),
    [
        ("gs://bucket/x/", "gs://bucket/x"),
        ("gs:/bucket/x", "gs://bucket/x"),
        ("memory://x", "memory://x"),
        ("simplecache::s3:/b/x", "simplecache::s3://b/x"),
    ],
)
def test_addresses_are_known_even_after_pathlib_had_them(given, place):
    assert locate(given) == place


@pytest.mark.parametrize("given", ["file:///srv/x", "file:/srv/x", "/srv/x"])
def test_the_local_folder_has_many_names(given):
    assert str(locate(given)) == "/srv/x"
    assert str(locate("x:y/z")) == "x:y/z"


class TestPublish:
    def test_new_and_changed_files_travel_and_the_manifest_last(self, box):
        write(box, manifest_json="1", sae__layer0_pt="weights", z_txt="z")
        assert box.publish(last=["manifest.json"]) == ["sae/layer0.pt", "z.txt", "manifest.json"]
        assert there(box) == {"manifest.json": "1", "sae/layer0.pt": "weights", "z.txt": "z"}
        assert box.publish(last=["manifest.json"]) == []
        write(box, manifest_json="22")
        assert box.publish() == ["manifest.json"]
        assert there(box)["manifest.json"] == "22"

    def test_hidden_files_stay_at_home(self, box):
        write(box, _half_tmp="x", _parts__a="x", a_txt="a")
        assert box.publish() == ["a.txt"]

    def test_a_failure_in_the_midst_leaves_no_half_file_and_tells_where_everything_is(self, box, monkeypatch):
        write(box, a_txt="a", b_txt="bb", c_txt="c", manifest_json="m")
        put = type(MEMORY).put_file

        def breaks(self, local, target, **options):
            if "b.txt" in target:
                self.pipe_file(target, b"b")  # half of it
                raise ConnectionResetError("the line is dead")
            return put(self, local, target, **options)

        monkeypatch.setattr(type(MEMORY), "put_file", breaks)
        with pytest.raises(SourceError, match=r"b\.txt did not arrive: .*the line is dead.*Nothing is lost") as failure:
            box.publish(last=["manifest.json"])
        assert str(box.folder) in str(failure.value)
        assert there(box) == {"a.txt": "a"}
        assert (box.folder / "b.txt").read_text() == "bb"
        monkeypatch.undo()
        assert box.publish(last=["manifest.json"]) == ["b.txt", "c.txt", "manifest.json"]

    def test_a_file_that_is_replaced_is_the_old_or_the_new_one(self, box, monkeypatch):
        write(box, a_txt="old")
        box.publish()
        write(box, a_txt="newer")
        monkeypatch.setattr(type(MEMORY), "put_file", lambda *_, **__: (_ for _ in ()).throw(OSError("full")))
        with pytest.raises(SourceError, match="full"):
            box.publish()
        assert there(box) == {"a.txt": "old"}

    def test_object_stores_are_given_the_file_under_its_own_name(self, box, monkeypatch):
        monkeypatch.setattr(type(MEMORY), "protocol", ("gs", "gcs"))
        monkeypatch.setattr(type(MEMORY), "mv", lambda *_, **__: pytest.fail("a copy of the whole"))
        write(box, a_txt="a")
        box.publish()
        assert there(box) == {"a.txt": "a"}

    def test_what_the_job_deletes_is_deleted_there_and_nothing_else(self, box):
        MEMORY.pipe({f"{box.root}/partial.txt": b"p", f"{box.root}/other.txt": b"o"})
        box.bring(["partial.txt"])
        write(box, a_txt="a", b_txt="b")
        box.publish()
        for name in ("partial.txt", "a.txt"):
            (box.folder / name).unlink()
        assert box.publish() == []
        assert there(box) == {"b.txt": "b", "other.txt": "o"}

    def test_missing_rights_are_an_error_of_their_own(self, box, monkeypatch):
        monkeypatch.setattr(type(MEMORY), "put_file", lambda *_, **__: (_ for _ in ()).throw(PermissionError("no")))
        write(box, a_txt="a")
        with pytest.raises(AccessError, match="these credentials may not write it"):
            box.publish()


class TestBring:
    def test_what_is_there_comes_and_is_not_sent_back(self, box):
        MEMORY.pipe({f"{box.root}/a.txt": b"a", f"{box.root}/sae/b.txt": b"b", f"{box.root}/.c.part": b"c"})
        assert box.bring() == ["a.txt", "sae/b.txt"]
        assert (box.folder / "sae/b.txt").read_text() == "b"
        write(box, a_txt="changed")
        assert box.publish() == ["a.txt"]

    def test_only_what_is_named(self, box):
        MEMORY.pipe({f"{box.root}/a.txt": b"a", f"{box.root}/manifest.json": b"{}"})
        assert box.bring(["manifest.json"]) == ["manifest.json"]

    def test_nothing_is_there_yet(self, box):
        assert box.bring() == []


def test_an_unknown_scheme_is_refused():
    with pytest.raises(SourceError, match="is not an address that fsspec knows"):
        open_outbox("nonsense://x")
