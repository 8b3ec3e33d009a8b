"""Pack sources one after the other, whatever is wrong with them: python tests/pack_alone.py SOURCE ...

The last line of the output is JSON: for each source its refusal, or counts, pictures skipped and repaired, and how many
records show another class than their label's (imagenet_files.py's pictures show their class); and the memory it took.
"""

import json
import resource
import sys
import tempfile
from pathlib import Path

import imagenet_files
import numpy as np

from data import pack, sources
from utils import UserError


def packed(place: str, out: Path) -> dict | str:
    try:
        source = sources.find(place)
        store = pack.pack(source, out, size=64, codec="raw", workers=2)
    except UserError as error:
        return str(error)
    wrong = 0
    for split in set(store.counts) - {"test"}:
        images, labels = store.split(split).read(np.arange(store.counts[split]))
        seen = [imagenet_files.label_of(image) for image in images]
        wrong += sum(one != other for one, other in zip(seen, labels.tolist(), strict=True))
    return {
        "listed": sum(len(part.labels) for part in source.splits.values()), "records": sum(store.counts.values()),
        "skipped": store.manifest["skipped"], "repaired": store.manifest["repaired"],
        "mislabelled": wrong if store.wnids else 0,
    }


def memory() -> int:
    """The most bytes that this process took, and two workers as large as the largest; what they share counts thrice."""
    own = next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM"))
    return 1024 * (int(own) + 2 * resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)


if __name__ == "__main__":
    pack.MAX_SKIPPED = 1
    with tempfile.TemporaryDirectory() as folder:
        places = [packed(place, Path(folder) / str(number)) for number, place in enumerate(sys.argv[1:])]
    print(json.dumps({"places": places, "memory": memory()}))
