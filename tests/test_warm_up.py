"""The kernels of a run are compiled before its first step, for the arguments of its launches."""

import runpy
import shutil
import subprocess
import sys
import sysconfig
import threading
from collections import Counter
from concurrent import futures
from dataclasses import replace
from functools import partial
from graphlib import TopologicalSorter
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchrec.distributed.train_pipeline import TrainPipelineSparseDist

from model.distributed import ALONE
from model.kernels import compiler
from model.kernels.compiler import (
    Launch,
    before_capture,
    captures_wait,
    launch,
    launches_wait,
    noted_launches,
    type_of,
)
from model.nodes import prepared_data
from model.run import warm_up
from model.run.build import num_attributes, train_loader
from model.run.execution import plan_execution
from model.run.warm_up import FakeStep, KernelsAhead
from model.settings.config import RunConfig
from model.settings.flags import FlagParser
from model.step.pipelines import MODULES_CALLED, ExchangingPipeline, StepPipeline
from pipeline.batches.attributes import ItemAttributes
from pipeline.training.loader import TrainLoader
from tests.conftest import ROOT, TINY, environment

triton = pytest.importorskip("triton")
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.runtime import build, driver  # noqa: E402

CUDA = torch.cuda.is_available()
GPU = torch.device("cuda", 0)


class NoDevice:
    """Triton's driver, of an H100 that need not be there."""

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)


@pytest.fixture
def no_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fake steps on a machine without CUDA."""
    monkeypatch.setattr(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: True)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    if not CUDA:
        monkeypatch.setattr(warm_up, "backward", backward_without_engine)
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
        properties = SimpleNamespace(multi_processor_count=132)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr("model.run.build.TrainLoader", partial(TrainLoader, few_shapes=True))
    monkeypatch.setattr(driver, "_active", NoDevice())


def backward_without_engine(loss: torch.Tensor, one: torch.Tensor) -> None:
    """Autograd's engine calls CUDA before it looks at fake tensors."""
    followed_by: dict[Any, set[Any]] = {}
    waiting = [loss.grad_fn]
    while waiting:
        node = waiting.pop()
        if node not in followed_by:
            followed_by[node] = {after for after, _ in node.next_functions if after is not None}
            waiting += followed_by[node]
    gradients: dict[Any, dict[int, torch.Tensor]] = {loss.grad_fn: {0: one}}
    for node in reversed([*TopologicalSorter(followed_by).static_order()]):
        found, edges = gradients.pop(node, {}), node.next_functions
        if not found or not edges:  # not used, or a leaf
            continue
        own = hasattr(node, "apply")  # an autograd.Function returns a gradient for every argument
        made = node._input_metadata
        outputs = [found.get(number) for number in range(len(made))]
        with torch.no_grad():
            if own:  # and receives zeros for outputs that are not used
                outputs = [
                    torch.zeros(of.shape, dtype=of.dtype, device=of.device) if one is None else one
                    for one, of in zip(outputs, made, strict=True)
                ]
            of_inputs = (node.apply if own else node)(*outputs)
        of_inputs = of_inputs if isinstance(of_inputs, tuple) else (of_inputs,)
        if own:
            needed = zip(of_inputs, node.needs_input_grad, strict=True)
            of_inputs = [gradient for gradient, needs in needed if needs]
            edges = [edge for edge in edges if edge[0] is not None]
        for (after, number), gradient in zip(edges, of_inputs, strict=True):
            if after is not None and gradient is not None:
                earlier = gradients.setdefault(after, {})
                earlier[number] = gradient + earlier[number] if number in earlier else gradient


def parts(
    cache_dir: Path, *flags: str, attributes: ItemAttributes | None = None
) -> tuple[FakeStep, TrainLoader, RunConfig, Any]:
    """The fake step of a tiny run on a GPU, and its loader."""
    arguments = (*TINY, f"--cache_dir={cache_dir}", "--train_batch_size=64", *flags)
    config = FlagParser("", RunConfig).parse(arguments)
    store, ranks = prepared_data(config.data, ALONE), replace(ALONE, device=GPU)
    plan = plan_execution(config, store.num_items, ranks, num_attributes(attributes))
    loader = train_loader(config, store, ALONE, plan)
    step = FakeStep(config, store.num_items, plan, ranks, attributes=attributes)
    return step, loader, config, plan


def launches_of(
    cache_dir: Path, *flags: str, steps: int = 1, attributes: ItemAttributes | None = None
) -> dict[Launch, None]:
    """Of the first training steps, or of an evaluation if there are none."""
    step, loader, *_ = parts(cache_dir, *flags, attributes=attributes)
    noted: dict[Launch, None] = {}
    with noted_launches(lambda each: noted.update({each: None})):
        for batch in islice(loader.examples(), steps):
            step.train(batch)
        if not steps:
            step.evaluate()
    return noted


# By hand: a layer's norms write bfloat16 rows for the next product, the last one float32 rows. Sums
# of rows by index, with no Adam: of learned positions, and of the targets in the exact loss.
# Columns are summed of gradients, and of the sums of programs; 16 divides their number or not.
ENCODER = {
    **{"from_end": 1, "enter": 1, "add": 2, "rotate": 1, "spans": 1, "attend": 1, "_gelu": 1},
    **{"enter_gradient": 1, "add_gradient": 2, "query_gradient": 1, "key_gradient": 1},
    **{"_gelu_gradient": 1, "_column_sum": 3},
}
ADAMW = {"_squares": 1, "_adamw": 1}
SUMS = {"_add_runs": 1, "_add_chunks": 1}
# Rows of the catalog and of the targets.
EXACT = {"_normalize_rows": 1, "_normalize_rows_gradient": 2}
# Looked up, and updated by Adam, another code of the sums.
TABLE = {"_rows_or_zeros": 1, "_add_runs": 2, "_add_chunks": 2}
ALL = ENCODER | EXACT | TABLE | ADAMW
FLOAT32 = EXACT | TABLE | {"from_end": 1, "_normalize_rows_gradient": 1}
# The loader sends positions.
TWO_STREAM = {name: count for name, count in ALL.items() if name != "from_end"}
NO_LEFT = "--left_context_share=0"


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ([NO_LEFT], ALL),
        (["--left_context_share=.5"], ALL),
        (["--left_context_share=.5", "--two_stream=true"], TWO_STREAM | {"_column_sum": 2}),
        (
            [NO_LEFT, "--loss=sampled_softmax"],
            ALL | {"_normalize_rows_gradient": 1, "_log_sums": 1},
        ),
        # In place; 24 masked positions, which 16 does not divide, and fewer than a chunk.
        (
            [NO_LEFT, "--train_batch_size=4"],
            ENCODER | EXACT | ADAMW | {"_rows_or_zeros": 1, "_update_all": 1, "_add_chunks": 2},
        ),
        ([NO_LEFT, "--table_precision=fp16"], ALL),
        ([NO_LEFT, "--head=linear"], ALL | {"_add_runs": 3, "_add_chunks": 3}),  # two tables
        ([NO_LEFT, "--mode=ddp"], ENCODER | EXACT | SUMS),
        ([NO_LEFT, "--embedding_optimizer=sgd"], ALL),
        ([NO_LEFT, "--precision=fp32"], FLOAT32),
    ],
)
def test_a_fake_step_notes_the_kernels_of_its_flags(
    flags: list[str], expected: dict[str, int], no_device: None, cache_dir: Path
) -> None:
    found = Counter(each.kernel.__name__ for each in launches_of(cache_dir, *flags))
    if "_update_all" in expected:
        assert found.pop("_add_runs") == 3
    assert found == expected


@pytest.mark.parametrize("flags", [(), ("--loss=sampled_softmax",), ("--mode=ddp",)])
def test_sums_of_attributes_are_noted_too(
    flags: tuple[str, ...], no_device: None, cache_dir: Path
) -> None:
    """The tiny run's 80 items have an attribute of five and one of three, but for item 1."""
    items = np.arange(82)
    places = np.stack([items % 5, 5 + items % 3], axis=1).astype(np.int32)
    places[[0, 1, -1]] = 8
    own = ItemAttributes(places, 8, items != 7)
    found, without = (
        Counter(each.kernel.__name__ for each in launches_of(cache_dir, *flags, attributes=each))
        for each in (own, None)
    )
    assert found.keys() == without.keys() | SUMS.keys()
    assert found["_add_runs"] > without["_add_runs"]


def test_kernels_of_other_sizes_are_noted_too(no_device: None, cache_dir: Path) -> None:
    flags = ("--two_stream=true", "--left_context_share=.5")
    first, all_ = (launches_of(cache_dir, *flags, steps=steps) for steps in (1, 9))
    # The tiny run has 143 windows: the last step has 15, and offsets of another alignment.
    more = Counter(each.kernel.__name__ for each in all_.keys() - first.keys())
    offset = {"rotate": 1, "query_gradient": 1, "key_gradient": 1}
    assert more == offset | {"enter": 1, "enter_gradient": 1, "_column_sum": 1}
    # Four windows have 64 positions; 16 or 24 masked ones reach the last layer's sums.
    tiny = launches_of(cache_dir, NO_LEFT, "--train_batch_size=4", steps=9)
    sizes = {each.arguments[2].rows for each in tiny if each.kernel.__name__ == "add"}
    assert sizes == {2, 16}


def test_an_evaluation_has_kernels_of_its_own(no_device: None, cache_dir: Path) -> None:
    found = launches_of(cache_dir, NO_LEFT, "--val_batch_size=32", steps=0)
    # Of the last layer's rows for 32 users, and for another number of users.
    last = {"add": 4, "_gelu": 2, "_normalize_rows": 2}
    rest = ("_rows_or_zeros", "from_end", "enter", "rotate", "spans", "attend")
    assert Counter(each.kernel.__name__ for each in found) == last | dict.fromkeys(rest, 1)


def test_a_rank_of_two_sends_nothing(no_device: None, cache_dir: Path) -> None:
    _, loader, config, plan = parts(cache_dir, NO_LEFT)
    ranks = replace(ALONE, rank=1, world_size=2, local_world_size=2, device=GPU)
    gathered = replace(plan, exchange="gather")
    noted: list[Launch] = []
    with noted_launches(noted.append):
        FakeStep(config, 80, gathered, ranks).train(next(loader.examples()))
    assert {each.kernel.__name__ for each in noted} == {*ALL}


def compile_ahead(cache_dir: Path) -> None:
    """Start as train.py does, and wait for everything."""
    _, loader, config, plan = parts(cache_dir)
    usual = sys.getswitchinterval()
    KernelsAhead(replace(ALONE, device=GPU)).start(config, 80, loader, plan)
    before_capture()
    assert not compiler._awaited
    assert sys.getswitchinterval() == usual


def test_other_threads_compile_each_kernel_once(
    no_device: None, cache_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled: list[tuple[Launch, str]] = []

    def compile_(noted: Launch) -> None:
        compiled.append((noted, threading.current_thread().name))

    monkeypatch.setattr(Launch, "compile", compile_)
    compile_ahead(cache_dir)
    expected = {*launches_of(cache_dir, steps=9), *launches_of(cache_dir, steps=0)}
    assert Counter(noted for noted, _ in compiled) == Counter(expected)
    assert threading.current_thread().name not in {name for _, name in compiled}


def test_no_module_is_called_while_a_model_is_traced(
    no_device: None, cache_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch.fx replaces the call of all modules, in all threads."""
    held: list[tuple[str, bool]] = []

    def notes(owner: type, name: str) -> None:
        called = getattr(owner, name)

        def noted(*given: Any) -> None:
            held.append((name, MODULES_CALLED.locked()))
            called(*given)

        monkeypatch.setattr(owner, name, noted)

    notes(FakeStep, "train")
    notes(FakeStep, "evaluate")
    monkeypatch.setattr(Launch, "compile", lambda noted: None)
    compile_ahead(cache_dir)
    assert {*held} == {("train", True), ("evaluate", True)}
    monkeypatch.setattr(TrainPipelineSparseDist, "_pipeline_model", lambda *_: None)
    notes(TrainPipelineSparseDist, "_pipeline_model")
    for pipeline in (StepPipeline, ExchangingPipeline):
        pipeline._pipeline_model(object.__new__(pipeline), None, None)
        assert held.pop() == ("_pipeline_model", True)
    assert not MODULES_CALLED.locked()


def test_a_compiler_that_fails_is_a_warning(
    no_device: None,
    cache_dir: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def fail(noted: Launch) -> None:
        raise RuntimeError("no ptxas")

    monkeypatch.setattr(Launch, "compile", fail)
    compile_ahead(cache_dir)
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "kernels" in line]
    assert line == "warning: kernels are compiled when they are used: RuntimeError: no ptxas"


def test_a_fake_model_that_fails_is_a_warning(
    no_device: None,
    cache_dir: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    _, loader, config, plan = parts(cache_dir)

    def fail(*given: Any, **named: Any) -> None:
        raise NotImplementedError("no fake operator")

    monkeypatch.setattr(warm_up, "build_plain_model", fail)
    KernelsAhead(replace(ALONE, device=GPU)).start(config, 80, loader, plan)
    assert "used: NotImplementedError: no fake operator\n" in capsys.readouterr().err
    assert not compiler._underway


def test_nothing_is_compiled_for_a_cpu(cache_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("FakeStep", "ThreadPoolExecutor"):
        monkeypatch.setattr(warm_up, name, None)
    config = FlagParser("", RunConfig).parse([*TINY, f"--cache_dir={cache_dir}"])
    plan = plan_execution(config, 80, ALONE)
    kernels = KernelsAhead(ALONE)
    kernels.start(
        config, 80, train_loader(config, prepared_data(config.data, ALONE), ALONE, plan), plan
    )
    assert not compiler._underway


class Kernel:
    """A kernel that keeps the grids it was launched with."""

    def __init__(self) -> None:
        self.launched: list[Any] = []
        self.params = [SimpleNamespace(is_constexpr=False), SimpleNamespace(is_constexpr=True)]

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        return lambda *arguments, **options: self.launched.append((grid, arguments, options))


def test_launches_are_noted_in_one_thread_only() -> None:
    kernel, noted = Kernel(), []
    with noted_launches(noted.append):
        launch(kernel, (3,), 48, 48, num_warps=2)
        other = threading.Thread(target=launch, args=(kernel, (4,), 48, 48))
        other.start()
        other.join()
    launch(kernel, (5, 1), 48, 48, num_warps=2)
    # 48 is a multiple of 16, a constant is itself.
    assert noted == [Launch(kernel, (16, 48), (("num_warps", 2),))]
    called = [((4,), (48, 48), {}), ((5, 1), (48, 48), {"num_warps": 2})]
    assert kernel.launched == called


def test_another_load_leaves_a_launcher_as_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Launchers of two kernels; that of the first is loaded once more, for a kernel like it."""
    has_headers = Path(sysconfig.get_path("include"), "Python.h").exists()
    if not has_headers or not any(map(shutil.which, ("cc", "gcc", "clang"))):
        pytest.skip("there is no C compiler")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    source = """#include <Python.h>
        static PyObject* launch(PyObject* self, PyObject* _) { return PyLong_FromLong(%d); }
        static PyMethodDef methods[] = {{"launch", launch, METH_NOARGS, ""}, {0}};
        static struct PyModuleDef module = {PyModuleDef_HEAD_INIT, "launcher", 0, -1, methods};
        PyMODINIT_FUNC PyInit_launcher(void) { return PyModule_Create(&module); }"""
    loaded = [build.compile_module_from_src(source % number, "launcher") for number in (1, 2, 1)]
    assert [each.launch() for each in loaded] == [1, 2, 1]


def test_a_triton_that_loads_otherwise_is_left_as_it_is() -> None:
    other = SimpleNamespace()
    assert not compiler.load_apart(other)
    assert not vars(other)


def test_a_triton_without_the_loaders_module_still_has_kernels(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delattr(triton.runtime, "build")
    monkeypatch.setitem(sys.modules, "triton.runtime.build", None)  # an import fails
    loaded = runpy.run_path(compiler.__file__)
    assert loaded["triton"] is triton
    assert not loaded["THREADS_COMPILE"]


@pytest.mark.parametrize("error", [None, RuntimeError("no ptxas")])
def test_a_launch_waits_for_its_own_kernel(error: Exception | None) -> None:
    one, other, begin = Kernel(), Kernel(), threading.Event()

    def compile_() -> None:
        begin.wait()
        if error is not None:  # the launch compiles
            raise error

    with futures.ThreadPoolExecutor(1) as pool:
        compiled = pool.submit(compile_)
        launches_wait(Launch.of(one, (32, 3), {}), compiled)
        launch(other, (1,), 32, 3)
        launch(one, (1,), 33, 3)  # of other code
        begin.set()
        launch(one, (1,), 48, 3)
        assert compiled.done()
    launch(one, (1,), 48, 3)
    assert (len(one.launched), len(other.launched)) == (3, 1)


def test_a_capture_waits_for_work_that_other_work_starts() -> None:
    done = []
    begin = threading.Event()
    with futures.ThreadPoolExecutor(2) as pool:

        def first() -> None:
            begin.wait()
            captures_wait(pool.submit(done.append, 2))
            done.append(1)

        captures_wait(pool.submit(first))
        begin.set()
        before_capture()
        assert sorted(done) == [1, 2]
    before_capture()  # nothing is left to wait for


def test_every_capture_waits() -> None:
    texts = [file.read_text() for file in (ROOT / "model").rglob("*.py")]
    captures = [text for text in texts if "torch.cuda.graph(" in text]
    assert len(captures) == 4
    assert all(text.count(" before_capture()\n") == 1 for text in captures)


SIZES = st.sampled_from([0, 1, 2, 8, 15, 16, 17, 96, 2**31 - 1, 2**31, 2**31 + 3, 2**40])


@given(SIZES, SIZES, st.integers(0, 9), st.sampled_from([torch.float32, torch.int64]))
@settings(max_examples=60, deadline=None)
def test_noted_types_are_those_that_triton_compiles_for(
    one: int, other: int, offset: int, dtype: torch.dtype
) -> None:
    from model.kernels.segment_sum import RowOptimizer, _add_runs

    keys: list[str] = []

    def keep(**about: Any) -> bool:
        keys.append(about["compile"]["key"])
        return True  # compile nothing

    tensor = torch.empty(64, dtype=dtype)[offset:]
    out = (tensor, torch.empty(16, 4), one)
    state = torch.empty(16, 4)
    kept = state, state, state[0], torch.empty(1, dtype=torch.int32)
    how, other_how = (
        RowOptimizer(triton.language.constexpr(3), *kept, 0.9, beta2, 1e-8, scale, one)
        for beta2, scale in ((0.98, 1.0), (0.999, 0.25))
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(driver, "_active", NoDevice())
        patch.setattr(triton.knobs.runtime, "jit_cache_hook", keep)
        values = tensor, tensor, other
        given_ = tensor, tensor, values, tensor, one, 16, other, out
        rest = "step", 32, 8, 4
        _add_runs.warmup(*given_, how, *rest, grid=(1,), num_warps=2)
        noted: list[Launch] = []
        with noted_launches(noted.append):
            for each in (how, other_how):  # another run's constants, on other ranks
                launch(_add_runs, (1,), *given_, each, *rest, num_warps=2)
        assert noted[0] == noted[1]
        noted[1].compile()
    assert keys[0] == keys[1]
    # And no more types than needed.
    assert len({type_of(size) for size in (0, 2, 5, 15, 17, 32, 48, 2**31 - 1)}) == 3


@pytest.mark.skipif(not CUDA, reason="needs CUDA")
@pytest.mark.parametrize(
    "flags",
    [
        ["--left_context_share=.5", "--two_stream=true", "--train_batch_size=128"],
        ["--loss=sampled_softmax", "--train_negatives=96", "--train_batch_size=128"],
    ],
)
def test_the_first_step_on_a_gpu_compiles_nothing(flags: list[str], tmp_path: Path) -> None:
    code = """
import triton
from train import main

def tell(*, is_manual_warmup, fn, **about):
    print("compiled", "ahead" if is_manual_warmup else "late", fn.name, flush=True)

triton.knobs.runtime.jit_post_compile_hook = tell
main()
"""
    places = [f"--run_dir={tmp_path / 'run'}", f"--cache_dir={tmp_path / 'data'}"]
    done = subprocess.run(
        [sys.executable, "-c", code, *TINY, "--max_steps=1", *flags, *places],
        cwd=ROOT,
        env=environment(CUDA_VISIBLE_DEVICES="0", TRITON_CACHE_DIR=str(tmp_path / "kernels")),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "compiled ahead" in done.stdout and "compiled late" not in done.stdout, done.stdout
