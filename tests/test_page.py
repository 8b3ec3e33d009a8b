"""checkpoints/classify.html in a real browser, without a screen: what it says of pictures is what the net says.

Skipped without a browser (chromium or Chrome) and without onnxruntime-web: npm install onnxruntime-web, and the
environment variable ONNXRUNTIME_WEB names its folder dist."""

import json
import os
import shutil
import subprocess
import threading
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import ROOT
from PIL import Image
from test_export import checkpoint_of, lively

from checkpoints import export, load_model
from model import AlexNet

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
DIST = Path(os.environ.get("ONNXRUNTIME_WEB", ROOT / "node_modules" / "onnxruntime-web" / "dist"))
if not BROWSER or not (DIST / "ort.wasm.min.js").exists():
    pytest.skip("there is no browser, or no onnxruntime-web", allow_module_level=True)

# Names each picture as if it had been chosen, and gives what came of it to the test.
DRIVER = """<script>net.then(async net => {
  const found = [];
  for (const file of PICTURES) {
    const picture = await (await fetch(file)).blob();
    const ranked = await recognise(net, picture).catch(error => String(error));
    found.push([ranked, document.getElementById('found').innerText]);
  }
  await fetch('results', {method: 'POST', body: JSON.stringify(found)});
}).catch(error => fetch('results', {method: 'POST', body: JSON.stringify(String(error))}))</script>"""


def ask_browser(folder: Path, pictures: list[str]):
    """What the page in `folder` says of pictures there, with net.onnx."""
    page = (ROOT / "checkpoints" / "classify.html").read_text()
    online = "https://cdn.jsdelivr.net/npm/onnxruntime-web/dist/"
    assert online in page
    for name in ("ort.wasm.min.js", "ort-wasm-simd-threaded.mjs", "ort-wasm-simd-threaded.wasm"):
        shutil.copy(DIST / name, folder)
    driver = DRIVER.replace("PICTURES", json.dumps(pictures))
    (folder / "page.html").write_text(page.replace(online, "").replace("</html>", f"{driver}</html>"))
    answers, arrived = [], threading.Event()

    class Handler(SimpleHTTPRequestHandler):
        def __init__(self, *args):
            super().__init__(*args, directory=folder)

        def do_POST(self):
            answers.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(200)
            self.end_headers()
            arrived.set()

        def log_message(self, *_):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}/page.html"
        options = ["--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={folder / 'profile'}"]
        browser = subprocess.Popen([BROWSER, *options, address], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            assert arrived.wait(120), "the page gave no answer"
        finally:
            browser.kill()
            browser.wait()
            server.shutdown()
    return answers[0]


@pytest.mark.parametrize("grey", [False, True])
def test_the_page_gives_the_nets_probabilities(grey, tmp_path):
    """Of lossless pictures, whatever their size; class names with markup stay text; what is no picture is told."""
    path = checkpoint_of(lively(AlexNet(6, image_size=64)), tmp_path / "net.pt", grey=grey)
    export.main([str(path), str(tmp_path / "net.onnx")])
    generator, names, squares = np.random.default_rng(0), [], []
    for number, (width, height) in enumerate([(72, 72), (72, 72), (150, 101), (72, 300), (33, 47), (500, 375)]):
        low = generator.integers(0, 256, (6, 8, 3), np.uint8)
        squares.append(Image.fromarray(low).resize((width, height), Image.Resampling.BICUBIC))
        names.append(f"{number}.png")
        squares[-1].save(tmp_path / names[-1])
    (tmp_path / "broken.png").write_bytes(b"nothing")
    answers = ask_browser(tmp_path, [*names, "broken.png"])
    model, prepare = load_model(path)
    with torch.no_grad():
        right = model(prepare(squares)).softmax(1).numpy()
    for number, ((ranked, shown), chances) in enumerate(zip(answers, right, strict=False)):
        found = {label: chance for chance, label in ranked}
        page = np.array([found[label] for label in model.classes])
        # At the store's own size nothing is resized; otherwise rounding may differ by 1 of 255.
        np.testing.assert_allclose(page, chances, atol=1e-4 if number < 2 else 0.02)
        assert page.argmax() == chances.argmax()
        assert model.classes[chances.argmax()] in shown
    assert "InvalidStateError" in answers[-1][0] or "Error" in answers[-1][0]
