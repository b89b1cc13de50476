"""The compiler backend: Inductor with optcpu's passes.

What Inductor calls on the way is in :mod:`optcpu.inductor_hooks`, what it is called for in
:mod:`optcpu.code_generation`.

Dynamo hands over one captured graph at a time. AOTAutograd traces forward and backward as one joint
graph, on which the ``"joint"`` passes run through Inductor's ``joint_custom_pre_pass`` hook. The
partitioner splits it, and on each half the ``"split"`` passes run before the graph enters Inductor, so
that its own cache key covers their result. The joint passes have no such luck: AOTAutograd's cache is
looked up before they run, so their key enters through ``uuid()``.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable, Sequence
from typing import Any

from torch import fx, nn
from torch._dynamo.exc import RestartAnalysis
from torch._functorch import config as functorch_config
from torch._inductor import config as inductor_config
from torch._inductor.compile_fx import compile_fx

import passes
from optcpu import random_numbers
from optcpu.checks import check_flag
from optcpu.code_generation import boxed, decompositions, generate
from optcpu.compiled_backward import allow_backward_again, backward_of
from optcpu.composites import take_replaced_apart
from optcpu.errors import CompileError, FallbackWarning, warn
from optcpu.inductor_hooks import HandOver, JointPasses, KeepRandomNumbers
from optcpu.optim.in_backward import ExpectedGradients, is_updated_in_backward
from optcpu.optim.weights import StoredWeight
from optcpu.pipeline import Pipeline, default_passes, resolve_precision
from optcpu.record import Fallback, GraphKind, GraphRun, Record, copy_graph
from optcpu.recurrent import recurrent_layers_taken_apart
from optcpu.remedies import DEPENDS_ON_DATA, cause_of, first_line, remedy_for
from passes.hand_over import Origins, origins, receive
from passes.indices import place_of
from passes.mutation import save_before_overwriting


class Backend:
    """A backend for :func:`torch.compile` that runs one pipeline.

    Args:
        pipeline: the passes.
        fallback: whether a part that cannot be compiled runs eagerly, with one warning, or raises
            :class:`optcpu.errors.CompileError`.
        record: where what happens is written down.
        activation_memory: the share of the activations' memory that may be used, from 0 to 1; what does
            not fit is computed anew in the backward pass.
        codegen: whether Inductor generates code for the rewritten graphs; without it they are run one
            operator at a time, which needs no C++ compiler and starts faster.

    Attributes:
        parts_run: how often a captured part has run.
        hands_over: whether backward graphs that are compiled from now on hand over the gradients of
            parameters one by one; a gradient is accumulated then before the graph ends, and
            ``torch.autograd.grad`` of parameters is refused.
    """

    def __init__(
        self,
        pipeline: Pipeline,
        *,
        fallback: bool = True,
        record: Record | None = None,
        activation_memory: float = 1.0,
        codegen: bool = True,
    ) -> None:
        self.pipeline = pipeline
        self.fallback = fallback
        self.activation_memory = activation_memory
        self.codegen = codegen
        self.record = record if record is not None else Record()
        self.parts_run = 0
        self.hands_over = False

    def __call__(self, module: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        """Compile one captured graph; the calling convention of Dynamo's backends."""
        region = self.record.regions
        self.record.regions += 1
        if self.record.keep_graphs:
            self.record.captured.append(copy.deepcopy(module.graph))
        _give_plain_views(module)
        eager = fx.GraphModule(module, copy.deepcopy(module.graph))
        key = self.cache_key()
        leaves = _updated_in_backward(module.graph) if self.hands_over else ()
        if key is not None:
            key = f"{key} {_places(module.graph)} {leaves}"
        compiler = _GraphCompiler(self, region, leaves)

        def run_joint_passes(joint: fx.GraphModule) -> None:
            self.run_passes(joint, "joint", GraphRun(region, "joint"))

        patches: dict[str, Any] = {"joint_custom_pre_pass": JointPasses(run_joint_passes, key)}
        if inductor_config.post_grad_custom_post_pass is None:
            patches["post_grad_custom_post_pass"] = HandOver(
                key, compiler.hand_over, compiler.what_is_handed_over
            )
        # A buffer that the backward may overwrite would forbid backward(retain_graph=True), which
        # allow_backward_again sees to as well.
        tracing: dict[str, Any] = {
            "donated_buffer": False,
            "activation_memory_budget": max(self.activation_memory, _LEAST_ACTIVATION_MEMORY),
        }
        if self.activation_memory < 1:
            patches["joint_custom_post_pass"] = KeepRandomNumbers(key)
        if key is None:
            patches["fx_graph_cache"] = False
            tracing["enable_autograd_cache"] = False
        take_replaced_apart()
        try:
            with functorch_config.patch(tracing), recurrent_layers_taken_apart():
                compiled: Any = compile_fx(
                    module,
                    example_inputs,
                    inner_compile=compiler,
                    config_patches=patches,
                    decompositions=decompositions(),
                )
        except RestartAnalysis:
            raise  # no failure: Dynamo captures anew, with what it has learnt
        except DEPENDS_ON_DATA as error:
            self.divided(f"captured graph {region}", error)
            raise
        except Exception as error:
            self.fell_back(f"captured graph {region}", error)
            compiled = eager.forward
            leaves = ()

        again = False

        def run(*inputs: Any) -> Any:
            nonlocal again
            self.parts_run += 1
            outputs = compiled(*inputs)
            if leaves or not again:
                node = backward_of(outputs)
                again = again or allow_backward_again(node)
                if leaves and node is not None:
                    receive(node, ExpectedGradients.of(inputs, leaves))
            return outputs

        return run

    def cache_key(self) -> str | None:
        """What the passes add to the key of every cache; None if nothing may come from one.

        Served from a cache, a graph would pass by the passes and leave nothing to look at. None holds
        where an environment variable forces the caches on, too.
        """
        if self.record.keep_graphs or not self.codegen:
            return None
        return self.pipeline.cache_key()

    def run_passes(self, module: fx.GraphModule, stage: passes.Stage, graph_run: GraphRun) -> None:
        """Run the passes of one stage over ``module`` and enter them into the record."""
        record = self.record
        record.graphs.append(graph_run)
        graph_run.initial = record.copy_of(module.graph)
        self.pipeline.run(
            module,
            stage,
            graph_run,
            keep_graphs=record.keep_graphs,
            on_failure=self.pass_failed,
        )
        graph_run.final = record.copy_of(module.graph)
        module.recompile()

    def fell_back(self, part: str, error: Exception) -> None:
        """Note and warn that ``part`` runs eagerly; raise instead where fallbacks are forbidden."""
        cause = cause_of(error)
        if isinstance(cause, CompileError):
            raise cause  # told already, further in
        problem = f"{part} is not compiled"
        self._tell(part, problem, error, remedy_for(error), "It runs eagerly")

    def divided(self, part: str, error: Exception) -> None:
        """Note and warn that Dynamo will leave out of ``part`` what ``error`` is about."""
        problem = f"{part} is not compiled as a whole"
        instead = "What is around it is compiled where functions and modules are not PyTorch's own"
        self._tell(part, problem, error, remedy_for(error), instead)

    def pass_failed(self, step: passes.Pass, error: Exception) -> None:
        """Note and warn that ``step`` was undone; raise instead where fallbacks are forbidden."""
        part = f"pass {step.name}"
        remedy = "correct the pass, or leave it out with passes=[...]"
        self._tell(part, f"{part} was undone", error, remedy, "The graph is compiled without it")

    def _tell(self, part: str, problem: str, error: Exception, remedy: str, instead: str) -> None:
        fallback = Fallback(part, first_line(error), remedy)
        message = f"optcpu: {problem}: {fallback.reason}. Remedy: {remedy}"
        if not self.fallback:
            raise CompileError(message) from error
        told = {f.reason for f in self.record.fallbacks}
        self.record.fallbacks.append(fallback)
        if fallback.reason not in told:
            warn(f"{message}. {instead}, with the right numbers.", FallbackWarning)


# PyTorch saves nothing at all where it is 0, not even what it was told to.
_LEAST_ACTIVATION_MEMORY = 1e-9


def _give_plain_views(module: fx.GraphModule) -> None:
    """Have a captured graph give plain tensors for views of stored weights that have a gradient.

    That gradient will be plain, and AOTAutograd takes only such as are of the output's kind. What is
    written to such a view does not reach the weight.
    """
    (output,) = module.graph.find_nodes(op="output")
    for node in dict.fromkeys(output.all_input_nodes):
        given = node.meta.get("example_value")
        if node.op != "placeholder" and isinstance(given, StoredWeight) and given.requires_grad:
            with module.graph.inserting_before(output):
                plain = module.graph.call_method("clone", (node,))
            plain.meta = {**node.meta, "example_value": given.clone()}
            output.replace_input_with(node, plain)
            module.recompile()


def _updated_in_backward(graph: fx.Graph) -> tuple[int, ...]:
    """Which inputs of a captured graph are parameters that an optimizer updates in the backward pass."""
    given = [
        getattr(n.meta.get("grapharg"), "example", None) for n in graph.find_nodes(op="placeholder")
    ]
    return tuple(
        place
        for place, value in enumerate(given)
        if isinstance(value, nn.Parameter) and is_updated_in_backward(value)
    )


def _places(graph: fx.Graph) -> str:
    """A hash of where the nodes are from, which errors tell: another place is another graph."""
    places = "\n".join(place_of(node) for node in graph.nodes)
    return hashlib.sha256(places.encode()).hexdigest()


class _GraphCompiler:
    """Compiles one partitioned graph: the split passes, then Inductor.

    Args:
        backend: whose passes run.
        region: the captured graph's number.
        leaves: the inputs of that graph whose gradients are handed over.
    """

    def __init__(self, backend: Backend, region: int, leaves: Sequence[int]) -> None:
        self._backend = backend
        self._region = region
        self._leaves = leaves
        self._saved: Origins = {}
        self._forward_is_eager = False

    def __call__(
        self, module: fx.GraphModule, example_inputs: Sequence[Any], **options: Any
    ) -> Any:
        kind = _kind(options)
        graph_run = GraphRun(self._region, kind)
        if kind == "forward":
            save_before_overwriting(module.graph)
            self._saved = origins(module.graph)
        self._backend.run_passes(module, "split", graph_run)
        eager = boxed(fx.GraphModule(module, copy.deepcopy(module.graph)))
        draws_anew = kind == "backward" and random_numbers.are_made_of_seeds(module.graph)
        if draws_anew and self._forward_is_eager:
            return eager
        if "get_decomp_fn" in options:  # 2.13; the cache key needs one that can be pickled
            options["get_decomp_fn"] = decompositions
        try:
            graph_run.written_out = passes.lower(module.graph)
            module.recompile()
            if not self._backend.codegen:
                if self._backend.record.keep_graphs:
                    twin = fx.GraphModule(module, copy_graph(module.graph))
                    graph_run.blocks = passes.share_blocks(twin)
                return boxed(module)
            compiled = generate(module, example_inputs, options, graph_run)
        except Exception as error:
            if draws_anew:
                raise CompileError(
                    f"optcpu: the backward of captured graph {self._region} cannot be compiled: "
                    f"{first_line(error)}. It needs the random numbers of the compiled forward again. "
                    "Remedy: take random operators out of what is checkpointed"
                ) from error
            self._backend.fell_back(f"the {kind} of captured graph {self._region}", error)
            self._forward_is_eager = True
            return eager
        if self._backend.record.keep_graphs:
            graph_run.output_code = getattr(compiled, "source_code", None)
        if self._backend.record.has_failed_pass(self._region):
            # Without a key AOTAutograd stores nothing that would hide the failure from the next run.
            compiled._fx_graph_cache_key = None  # type: ignore[attr-defined]
        return compiled

    def hand_over(self, graph: fx.Graph) -> None:
        """Let a backward graph that has found its final form hand gradients over."""
        if self._leaves:
            passes.hand_over_gradients(graph, self._leaves, self._saved)

    def what_is_handed_over(self) -> str:
        """What :meth:`hand_over` depends on besides the graph."""
        return f"{self._leaves} {sorted((n, sorted(w)) for n, w in self._saved.items() if w)}"


def _kind(options: dict[str, Any]) -> GraphKind:
    if options.get("is_backward"):
        return "backward"
    return "inference" if options.get("is_inference") else "forward"


def optcpu_backend(
    module: fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    options: dict[str, Any] | None = None,
    mode: str | None = None,
) -> Callable[..., Any]:
    """``torch.compile(model, backend="optcpu", options={...})``.

    Args:
        module, example_inputs: from Dynamo.
        options: ``precision`` (``"auto"``, ``"bf16"``, ``"fp32"``), ``passes``, ``fallback``; as in
            :func:`optcpu.optimize`.
        mode: not used by this backend.

    Raises:
        TypeError: ``fallback`` is neither True nor False.
        ValueError: an option or the mode is unknown.
    """
    if mode not in (None, "default"):
        raise ValueError(f"backend 'optcpu' has no mode {mode!r}; leave it out")
    settings = {"precision": "auto", "passes": None, "fallback": True, **(options or {})}
    unknown = settings.keys() - {"precision", "passes", "fallback"}
    if unknown:
        raise ValueError(
            f"backend 'optcpu' has no option {sorted(unknown)[0]!r}; "
            "it takes 'precision', 'passes' and 'fallback'"
        )
    check_flag("fallback", settings["fallback"])
    chosen = settings["passes"]
    if chosen is None:
        chosen = default_passes(resolve_precision(settings["precision"]))
    return Backend(Pipeline.of(chosen), fallback=settings["fallback"])(module, example_inputs)
