import gzip
import hashlib
import socket
import struct
import threading
from functools import partial
from http.server import BaseHTTPRequestHandler, SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest

from crevnet.data import DataError, load_mnist, mnist

REAL = Path(__file__).parents[3].parent / "shared/data/mnist"

IMAGES = np.random.default_rng(0).integers(0, 256, (5, 28, 28), np.uint8)
LABELS = np.arange(5, dtype=np.uint8)


def to_idx(array: np.ndarray) -> bytes:
    return struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape) + array.tobytes()


TINY = {
    "train-images-idx3-ubyte": to_idx(IMAGES),
    "train-labels-idx1-ubyte": to_idx(LABELS),
    "t10k-images-idx3-ubyte": to_idx(IMAGES[::-1]),
    "t10k-labels-idx1-ubyte": to_idx(LABELS[::-1]),
}


def publish(monkeypatch: pytest.MonkeyPatch, files: dict[str, bytes]) -> None:
    monkeypatch.setattr(mnist, "MD5", {name: hashlib.md5(content).hexdigest() for name, content in files.items()})


def write(folder: Path, files: dict[str, bytes], compressed: bool = True) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        if compressed:
            (folder / f"{name}.gz").write_bytes(gzip.compress(content))
        else:
            (folder / name).write_bytes(content)


@pytest.fixture(autouse=True)
def tiny_files_are_the_published_ones(monkeypatch, request):
    if "real" not in request.node.name:
        publish(monkeypatch, TINY)


@pytest.fixture
def serve(monkeypatch):
    """Serve with a request handler class on 127.0.0.1; returns the base URL."""
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    servers = []

    def start(handler) -> str:
        server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        servers.append((server, thread))
        return f"http://127.0.0.1:{server.server_port}/"

    yield start
    for server, thread in servers:
        server.shutdown()
        server.server_close()
        thread.join()


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *args):
        pass


@pytest.mark.parametrize("folder", ["", "MNIST/raw"])
@pytest.mark.parametrize("compressed", [True, False])
def test_finds_either_layout_and_compression(tmp_path, folder, compressed):
    write(tmp_path / folder, TINY, compressed)
    train, test = load_mnist(tmp_path, "train"), load_mnist(str(tmp_path), "test")
    assert (train.images == IMAGES).all()
    assert (train.labels == LABELS).all()
    assert (test.images == IMAGES[::-1]).all()
    assert (test.labels == LABELS[::-1]).all()
    assert (train.name, test.name) == ("MNIST train", "MNIST test")


def test_unknown_split(tmp_path):
    with pytest.raises(ValueError, match="split must be 'train' or 'test', got 'valid'"):
        load_mnist(tmp_path, "valid")


@pytest.mark.parametrize("gone", ["train-images-idx3-ubyte", "train-labels-idx1-ubyte"])
def test_missing_file_is_named_with_the_fix(tmp_path, gone):
    write(tmp_path, {name: content for name, content in TINY.items() if name != gone})
    with pytest.raises(DataError, match=f"{gone}: no such file.*download=True.*root=None"):
        load_mnist(tmp_path, "train")


@pytest.mark.parametrize("compressed", [True, False])
def test_wrong_md5_names_file_both_sums_and_fix(tmp_path, compressed):
    name = "train-images-idx3-ubyte"
    other = TINY[name][:-1] + bytes([TINY[name][-1] ^ 1])
    write(tmp_path, TINY | {name: other}, compressed)
    with pytest.raises(DataError) as caught:
        load_mnist(tmp_path, "train")
    message = str(caught.value)
    assert str(tmp_path / name) in message
    assert hashlib.md5(other).hexdigest() in message
    assert hashlib.md5(TINY[name]).hexdigest() in message
    assert "delete the file and fetch it again" in message


def test_damaged_gzip_is_named(tmp_path):
    write(tmp_path, TINY)
    path = tmp_path / "train-labels-idx1-ubyte.gz"
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(DataError, match=r"train-labels-idx1-ubyte.gz: damaged gzip"):
        load_mnist(tmp_path, "train")


@pytest.mark.parametrize("cut", [0, 3, 10, 500])
def test_a_truncated_file_is_named_with_the_fix(tmp_path, cut):
    name = "train-images-idx3-ubyte"
    write(tmp_path, TINY | {name: TINY[name][:cut]}, compressed=False)
    with pytest.raises(DataError, match=rf"{name}: not the published {name}.*; delete the file and fetch it again"):
        load_mnist(tmp_path, "train")


def test_download_fetches_only_what_is_missing(tmp_path, serve):
    source, root = tmp_path / "mirror", tmp_path / "new" / "root"
    write(source, TINY)
    write(root, {"train-labels-idx1-ubyte": TINY["train-labels-idx1-ubyte"]}, compressed=False)
    asked = []

    class Counting(Quiet):
        def do_GET(self):
            asked.append(self.path)
            super().do_GET()

    url = serve(partial(Counting, directory=source))
    digits = load_mnist(root, "train", download=True, base_url=url)
    assert (digits.images == IMAGES).all()
    assert asked == ["/train-images-idx3-ubyte.gz"]
    assert sorted(path.name for path in root.iterdir()) == [
        "train-images-idx3-ubyte.gz",
        "train-labels-idx1-ubyte",
    ]
    load_mnist(root, "train", download=True, base_url=url)
    assert len(asked) == 1


class CutOff(BaseHTTPRequestHandler):
    """Promises more than it sends."""

    def do_GET(self):
        self.send_response(200)
        self.send_header("Content-Length", "1000000")
        self.end_headers()
        self.wfile.write(gzip.compress(TINY["train-images-idx3-ubyte"])[:100])

    def log_message(self, *args):
        pass


def failing_url(kind: str, tmp_path: Path, serve) -> str:
    if kind == "not found":
        (tmp_path / "mirror").mkdir()
        return serve(partial(Quiet, directory=tmp_path / "mirror"))
    if kind == "other content":
        write(tmp_path / "mirror", {"train-images-idx3-ubyte": b"something else"})
        return serve(partial(Quiet, directory=tmp_path / "mirror"))
    if kind == "cut off":
        return serve(CutOff)
    if kind == "not a URL":
        return "nowhere"
    with socket.create_server(("127.0.0.1", 0)) as closed:
        return f"http://127.0.0.1:{closed.getsockname()[1]}"


@pytest.mark.parametrize("kind", ["not found", "other content", "cut off", "not a URL", "refused"])
def test_failed_download_says_what_to_do_and_leaves_nothing(tmp_path, serve, kind):
    root = tmp_path / "root"
    with pytest.raises(DataError) as caught:
        load_mnist(root, "train", download=True, base_url=failing_url(kind, tmp_path, serve))
    message = str(caught.value)
    assert str(root / "train-images-idx3-ubyte.gz") in message
    assert "offline, copy train-images-idx3-ubyte.gz into" in message
    assert list(root.iterdir()) == []


def test_silent_server_times_out(tmp_path, monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        with pytest.raises(DataError, match=r"download from .* failed \(timed out\)"):
            load_mnist(tmp_path, "train", download=True, base_url=url, timeout=0.05)


@pytest.mark.skipif(not REAL.is_dir(), reason="the MNIST files are not beside this checkout")
@pytest.mark.parametrize(
    ("split", "count", "labels"), [("train", 60_000, [5, 0, 4, 1, 9]), ("test", 10_000, [7, 2, 1, 0, 4])]
)
def test_real_files(split, count, labels):
    digits = load_mnist(REAL, split)
    assert digits.images.shape == (count, 28, 28)
    assert digits.labels[:5].tolist() == labels
    assert sorted(set(digits.labels.tolist())) == list(range(10))
