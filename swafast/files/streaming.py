"""One pass over all inputs, a chunk at a time: read, sum, round, write. Memory does not grow with the tensors."""

from __future__ import annotations

import math
import struct
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from .agreement import Agreed, why_unequal
from .checkpoints import AVERAGED_DTYPES, ITEMSIZES, Checkpoint, Output
from .summing import CHUNK_NUMEL, Summing

#: Small chunks that one thread takes at once.
_MOST_TOGETHER = 100
#: What two threads hold beside the interpreter, for a report.
NBYTES_PER_THREAD = 16 * CHUNK_NUMEL


@dataclass(frozen=True)
class Pass:
    """What a pass over the inputs does."""

    inputs: Sequence[Checkpoint]
    tensors: Sequence[Agreed]
    coefficients: Sequence[float] | None  # None: the equal mean, a sum that is divided
    keep_nonfinite: bool
    summing: Callable[[], Summing]

    def run(self, output: Output, threads: int, advance: Callable[[int], object]) -> None:
        """Fill the output, and call ``advance`` with the bytes that were read and written.

        The calling thread waits, so that Ctrl-C reaches it. The threads have ended when this returns or raises.
        """
        chunks, lock, failures = self._chunks(), threading.Lock(), list[BaseException]()
        stopped = threading.Event()

        def work() -> None:
            try:
                summing = self.summing()
                while not stopped.is_set():
                    with lock:
                        some = next(chunks, None)
                    if some is None:
                        return
                    nbytes = sum(self._do(*chunk, summing, output) for chunk in some)
                    with lock:
                        advance(nbytes)
            except BaseException as error:
                failures.append(error)
                stopped.set()

        workers = [threading.Thread(target=work, name=f"swafast-average-{n}", daemon=True) for n in range(threads)]
        try:
            for worker in workers:
                worker.start()
            for worker in workers:
                worker.join()
        finally:
            stopped.set()
            for worker in workers:
                if worker.ident is not None:
                    worker.join()
        if failures:
            raise failures[0]

    def _chunks(self) -> Iterator[list[tuple[Agreed, int, int]]]:
        """Yield chunks, small ones of several tensors together: two threads lose time when they take turns."""
        some, left = list[tuple[Agreed, int, int]](), CHUNK_NUMEL
        for tensor in self.tensors:
            numel = tensor.spec.numel
            for start in range(0, numel, CHUNK_NUMEL):
                size = min(CHUNK_NUMEL, numel - start)
                if size > left or len(some) == _MOST_TOGETHER:
                    yield some
                    some, left = [], CHUNK_NUMEL
                some.append((tensor, start, size))
                left -= size
        if some:
            yield some

    def _do(self, tensor: Agreed, start: int, numel: int, summing: Summing, output: Output) -> int:
        """Average or copy one chunk. Return how many bytes were read and written."""
        if tensor.spec.dtype in AVERAGED_DTYPES:
            self._average(tensor, start, numel, summing)
        else:
            self._copy(tensor, start, numel, summing.buffer)
        itemsize = ITEMSIZES[tensor.spec.dtype]
        output.write(tensor.spec.name, start * itemsize, summing.buffer[: numel * itemsize])
        return numel * (itemsize + sum(ITEMSIZES[tensor.dtypes[place]] for place in tensor.read_from))

    def _average(self, tensor: Agreed, start: int, numel: int, summing: Summing) -> None:
        """Average one chunk. That of one input alone stays as it is, but for its dtype."""
        places = tensor.read_from
        coefficients = self.coefficients if len(places) > 1 else None
        for place in places:
            dtype = tensor.dtypes[place]
            itemsize = ITEMSIZES[dtype]
            self.inputs[place].read_into(tensor.names[place], start * itemsize, summing.buffer[: numel * itemsize])
            summing.add(dtype, numel, 1.0 if coefficients is None else coefficients[place], begin=place == places[0])
        divisor = 1.0 if coefficients is not None else float(len(places))
        nonfinite = summing.finish(tensor.spec.dtype, numel, divisor)
        if nonfinite is not None and not self.keep_nonfinite:
            raise ValueError(self._why_nonfinite(tensor, start + nonfinite))

    def _copy(self, tensor: Agreed, start: int, numel: int, buffer: memoryview) -> None:
        itemsize = ITEMSIZES[tensor.spec.dtype]
        window = buffer[: numel * itemsize]
        first: bytes | None = None
        for place in tensor.read_from:
            self.inputs[place].read_into(tensor.names[place], start * itemsize, window)
            if first is not None and first != window:
                paths = self.inputs[next(iter(tensor.read_from))].path, self.inputs[place].path
                raise ValueError(why_unequal(tensor, *paths))
            first = bytes(window) if first is None and tensor.is_equal else first

    def _why_nonfinite(self, tensor: Agreed, index: int) -> str:
        name, where = tensor.spec.name, f"at {_coordinates(index, tensor.spec.shape)}"
        advice = "nonfinite='keep' (--nonfinite keep) writes it all the same"
        for place in tensor.read_from:
            each, dtype = self.inputs[place], tensor.dtypes[place]
            element = bytearray(ITEMSIZES[dtype])
            each.read_into(tensor.names[place], index * len(element), memoryview(element))
            value = _value(bytes(element), dtype)
            if not math.isfinite(value):
                return f"{each.path}: the tensor {name} holds {value} {where}: leave that input out, or {advice}"
        if tensor.spec.dtype == "F64":
            return f"the sum of the tensor {name} is no finite float64 {where}: pass weights (--weights), or {advice}"
        return (
            f"the average of the tensor {name} is no finite {tensor.spec.dtype} {where}: choose a larger dtype, "
            f"or {advice}"
        )


def _value(element: bytes, dtype: str) -> float:
    """Return the element of a dtype that is averaged."""
    if dtype == "BF16":
        element, dtype = b"\0\0" + element, "F32"
    return float(struct.unpack({"F64": "<d", "F32": "<f", "F16": "<e"}[dtype], element)[0])


def _coordinates(index: int, shape: Sequence[int]) -> list[int]:
    found = []
    for size in reversed(shape):
        index, last = divmod(index, size)
        found.append(last)
    return found[::-1]
