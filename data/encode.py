"""What a packing process does with a chunk of pictures: decode, resize, encode, and sum up their pixels."""

from dataclasses import dataclass, field

import numpy as np

from data.loader import lacks_memory
from data.pictures import Files, pixels, square
from data.store import encode_record
from utils import UserError

JPEG_QUALITY = 90
CHUNK = 64  # pictures that a worker encodes at a time; their sums fit into 16 bits


class Moments:
    """First and second moments of pictures (H, W, C), as exact whole numbers: totals do not depend on the order."""

    def __init__(self, shape: tuple[int, int, int], dtype=np.int64):
        self.count, self.total = 0, np.zeros(shape, dtype)
        self.products = np.zeros((shape[2], shape[2]), np.int64)

    def include(self, picture: np.ndarray) -> None:
        """One uint8 picture. Products of channels follow from the squares of their differences, which OpenCV sums up
        in whole numbers: ab = (aa + bb - (a - b)(a - b)) / 2."""
        import cv2

        self.count += 1
        np.add(self.total, picture, out=self.total)
        planes = cv2.split(picture)
        squares = [round(cv2.norm(plane, cv2.NORM_L2SQR)) for plane in planes]
        for i, first in enumerate(planes):
            self.products[i, i] += squares[i]
            for j, second in enumerate(planes[:i]):
                difference = round(cv2.norm(first, second, cv2.NORM_L2SQR))
                self.products[i, j] += (squares[i] + squares[j] - difference) // 2
                self.products[j, i] = self.products[i, j]

    def add(self, other: "Moments") -> None:
        self.count += other.count
        self.total += other.total
        self.products += other.products

    def mean(self) -> np.ndarray:
        """The mean image, (H, W, C)."""
        return self.total / max(1, self.count)

    def pca(self) -> dict:
        """Eigenvalues (largest first) and unit eigenvectors (one a row) of the 3 x 3 covariance of the RGB values of
        all training pixels (paper, section 4.1); a grey set counts as three equal channels."""
        channels = self.products.shape[0]
        count = max(1, self.count) * self.total.shape[0] * self.total.shape[1]
        mean = self.total.sum((0, 1)) / count
        covariance = self.products / count - np.outer(mean, mean)
        if channels == 1:
            covariance = np.full((3, 3), covariance[0, 0])
        values, vectors = np.linalg.eigh(covariance)
        return {"eigenvalues": values[::-1].clip(0).tolist(), "eigenvectors": vectors.T[::-1].tolist()}


@dataclass
class Encoded:
    """Records of a chunk; the pictures that were skipped, and why; the names of repaired ones by what was unusual."""

    records: list[bytes] = field(default_factory=list)
    skipped: list[dict] = field(default_factory=list)
    repaired: dict[str, list[str]] = field(default_factory=dict)
    moments: Moments | None = None


def encode_chunk(job) -> Encoded:
    """Encode (pictures, labels, number of the first in its split, (size, size, channels), codec, whether to sum)."""
    pictures, labels, first, shape, codec, with_sums = job
    done = Encoded(moments=Moments(shape, np.uint16) if with_sums else None)
    for index, label in enumerate(labels.tolist()):
        name = pictures.name(index) if isinstance(pictures, Files) else f"picture {first + index}"
        try:
            array, unusual = pixels(pictures[index], shape[2])
            small = square(array, shape[0])
            done.records.append(encode_record(payload(small, codec), label, shape, codec))
        except Exception as error:  # damaged pictures raise nearly anything
            if isinstance(error, OSError) or lacks_memory(error):  # the machine's fault: stop, to be resumed
                raise
            reason = str(error) if isinstance(error, UserError) else f"{name} cannot be packed ({error!r})"
            done.skipped.append({"row": first + index, "picture": name, "reason": reason})
            continue
        if isinstance(pictures, Files) and min(array.shape[:2]) < shape[0]:
            unusual.append("enlarged")
        for word in unusual:
            done.repaired.setdefault(word, []).append(name)
        if with_sums:
            done.moments.include(small)
    return done


def payload(square: np.ndarray, codec: str) -> bytes:
    """The bytes of a record; a JPEG file is the one that Pillow writes, and OpenCV is faster."""
    if codec == "raw":
        return square.tobytes()
    import cv2

    if square.shape[2] == 3:
        square = cv2.cvtColor(square, cv2.COLOR_RGB2BGR)
    return cv2.imencode(".jpg", square, [cv2.IMWRITE_JPEG_QUALITY, JPEG_QUALITY])[1].tobytes()
