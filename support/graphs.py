"""CUDA graphs: a pass or a training step as one launch."""

import gc
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import lru_cache, partial
from itertools import pairwise

import torch
from torch import Tensor


def beside(first: Callable, second: Callable, stream: torch.cuda.Stream | None) -> tuple:
    """(first(), second()); with a stream second's work goes there, beside first's on the current
    one. What both read must be there already. A graph keeps the fork."""
    if stream is None:
        return first(), second()
    current = torch.cuda.current_stream(stream.device)
    stream.wait_stream(current)
    with torch.cuda.stream(stream):
        result = second()
    results = first(), result
    current.wait_stream(stream)
    return results


@lru_cache(maxsize=16)
def side_stream(device: torch.device, purpose: str = "autoencoder") -> torch.cuda.Stream | None:
    """A stream of a GPU, one for each purpose: torch has 32 and hands them out again then."""
    return torch.cuda.Stream(device) if device.type == "cuda" else None


def graph_milliseconds(function: Callable) -> float:
    """The GPU's time of a call, by replaying a graph of it, or of ten if they are short: the host
    takes longer to launch a graph than a short kernel takes. The least of seven replays. Infinite,
    with a warning, if it cannot be captured."""

    def calls() -> object:
        for _ in range(repeats):
            result = function()  # one at a time: they may be large
        return result

    device, events, repeats = torch.device("cuda", torch.cuda.current_device()), [], 1
    graphed = Graphed(calls, device)
    graphed()  # the first call compiles and tunes
    torch.cuda.synchronize(device)
    began = time.perf_counter()
    graphed()
    torch.cuda.synchronize(device)
    repeats = 10 if time.perf_counter() - began < 2e-3 else 1
    for _ in range(Graphed.WARM_UP - 1):
        graphed()
    for _ in range(8):
        events.append(torch.cuda.Event(enable_timing=True))
        events[-1].record()
        graphed()
    torch.cuda.synchronize(device)
    times = [start.elapsed_time(end) / repeats for start, end in pairwise(events)]
    return min(times) if graphed.graph else float("inf")


@contextmanager
def cudnn_tunes() -> Iterator[None]:
    """Within it cuDNN times its algorithms for each new shape."""
    before, torch.backends.cudnn.benchmark = torch.backends.cudnn.benchmark, True
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before


class Graphed:
    """A function of no arguments as one CUDA graph; the tensors that it reads and writes must stay
    where they are. The first calls are ordinary ones on a side stream, as torch wants before a
    capture. From then on a call launches all kernels at once, and its result lies in the same
    tensors each time. If the capture fails, a warning says so and calls stay ordinary. On another
    device every call is ordinary. All share a stream for capture: first calls of two threads take
    turns, as `BatchGraphs` sees to."""

    WARM_UP = 3

    def __init__(self, function: Callable, device: torch.device):
        self.function, self.device, self.calls = function, device, 0
        self.graph, self.result = None, None
        self.stream = side_stream(device, "capture")

    def __call__(self):
        if self.stream is None:
            return self.function()
        with torch.cuda.device(self.device):
            self.calls += 1
            if self.calls <= self.WARM_UP:
                self.stream.wait_stream(torch.cuda.current_stream())
                with torch.cuda.stream(self.stream):
                    result = self.function()
                torch.cuda.current_stream().wait_stream(self.stream)
                return result
            if self.graph is None:
                self.capture()
            if self.graph is None:
                return self.function()
            self.graph.replay()
            return self.result

    def capture(self) -> None:
        """Record the graph; it computes nothing yet."""
        graph, pool = torch.cuda.CUDAGraph(), torch.cuda.graph_pool_handle()
        # another thread, such as a data loader's, may call the GPU meanwhile
        options = {"pool": pool, "stream": self.stream, "capture_error_mode": "thread_local"}
        gc.collect()  # a step that is no longer used, and its graph, refer to each other
        collects = gc.isenabled()
        gc.disable()  # to destroy another graph meanwhile would end the capture
        try:
            with torch.cuda.stream(torch.cuda.current_stream()):  # a failure would leave another
                with torch.cuda.graph(graph, **options):
                    self.result = self.function()
        except RuntimeError as error:
            warnings.warn(f"no CUDA graph, each kernel is launched by itself: {error}")
            with suppress(RuntimeError, AttributeError):  # else freed memory is held for ever
                torch._C._cuda_endAllocateToPool(torch.cuda.current_device(), pool)
                torch._C._cuda_releasePool(torch.cuda.current_device(), pool)
            self.stream = self.result = None
            return
        finally:
            if collects:
                gc.enable()
        self.graph, self.function = graph, None  # which may hold this object: no cycle is left


class BatchGraphs:
    """A function of a model: uint8 N×3×H×W on any device -> a tuple of tensors. On a GPU a batch of
    one of `batch_sizes` is one graph launch behind a copy of the images. The caller may overwrite
    its images at once, and call from several threads and streams: calls take turns."""

    # Of all models, whose side streams are the same; nor does a capture bear another's launch.
    turn, events = threading.Lock(), {}

    def __init__(self, function: Callable, image_size, device: torch.device, batch_sizes: Sequence):
        self.function, self.graphs = function, {}  # by batch size: images' buffer, its graph
        self.device, self.done = device, None
        if device.type == "cuda":  # the end of the latest call, and of the latest copy
            self.done = self.events.setdefault(device, torch.cuda.Event())
            self.copied = torch.cuda.Event()
        for n in batch_sizes if self.done else ():
            with torch.inference_mode(False):  # else it could only be written within that mode
                buffer = torch.zeros(n, 3, *image_size, dtype=torch.uint8, device=device)
            self.graphs[n] = buffer, Graphed(partial(function, buffer), device)
        with self.turn, cudnn_tunes(), torch.no_grad(), self.own_precision():
            if self.graphs:  # earlier calls' work is over; a dropped model's graphs hold memory
                torch.cuda.synchronize(device)
                gc.collect()
            for _, graph in self.graphs.values():
                for _ in range(Graphed.WARM_UP + 1):
                    graph()

    def __call__(self, images: Tensor) -> tuple[Tensor, ...]:
        if self.done is None:
            with torch.no_grad(), self.own_precision():
                return self.function(images)
        current = torch.cuda.current_stream(self.device)
        with self.turn, torch.no_grad(), self.own_precision():
            current.wait_event(self.done)
            results = self.launch(images, current)
            self.done.record(current)
        if images.is_pinned():  # a camera may refill its own memory
            self.copied.synchronize()
        return results

    def own_precision(self) -> torch.autocast:
        """The function's, whatever autocast the caller is in."""
        return torch.autocast(self.device.type, enabled=False)

    def launch(self, images: Tensor, current: torch.cuda.Stream) -> tuple[Tensor, ...]:
        """Nothing waits; an earlier call's work is over when this one's begins."""
        buffer, graph = self.graphs.get(len(images), (None, None))
        if graph is None or images.dtype != buffer.dtype or images.shape != buffer.shape:
            return self.function(images.to(self.device))
        there = images.is_cuda or images.is_pinned()
        buffer.copy_(images if there else images.contiguous().pin_memory(), non_blocking=True)
        self.copied.record(current)
        return tuple(result.clone() for result in graph())  # the graph's own are overwritten
