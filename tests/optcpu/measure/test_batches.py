from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from optcpu.measure.batches import (
    as_batches,
    call_model,
    check_targets,
    default_loss,
    describe_call,
    signature,
    tensors_in,
    units_in,
    whole_passes,
)

X = torch.randn(4, 8)
Y = torch.randint(0, 3, (4,))


def recorder(*args: Any, **kwargs: Any) -> tuple[Any, Any]:
    return args, kwargs


class TestForms:
    def test_a_tensor_is_one_batch(self) -> None:
        assert as_batches(X) == [X]
        assert call_model(recorder, X) == ((X,), {})

    def test_a_tuple_is_inputs_and_a_target(self) -> None:
        (batch,) = as_batches((X, X, Y))
        args, kwargs = call_model(recorder, batch)
        assert [a is X for a in args] == [True, True]
        assert kwargs == {}

    def test_a_tuple_of_one_has_no_target(self) -> None:
        assert call_model(recorder, (X,)) == ((X,), {})

    def test_a_dict_is_passed_as_keywords(self) -> None:
        (batch,) = as_batches({"x": X, "labels": Y})
        assert call_model(recorder, batch) == ((), {"x": X, "labels": Y})

    def test_a_dict_before_a_target_is_passed_as_keywords(self) -> None:
        (batch,) = as_batches(({"x": X}, Y))
        assert call_model(recorder, batch) == ((), {"x": X})

    def test_a_list_is_several_batches_and_lists_in_it_are_tuples(self) -> None:
        batches = as_batches([[X, Y], (X, Y), {"x": X}])
        assert [type(batch) for batch in batches] == [tuple, tuple, dict]

    def test_a_list_of_tensors_is_refused_with_both_remedies(self) -> None:
        with pytest.raises(TypeError, match=r"tuple\(batch\).*\[\(x,\) for x in batch\]"):
            as_batches([X, Y])

    @pytest.mark.parametrize(
        ("batch", "error", "message"),
        [
            ([], ValueError, "empty list"),
            ((), ValueError, "without any tensor"),
            ({}, ValueError, "without any tensor"),
            (("text", 3), ValueError, "without any tensor"),
            ("text", TypeError, "type str"),
            (None, TypeError, "type NoneType"),
            ((torch.empty(0, 8), torch.empty(0)), ValueError, "the batch is empty"),
            ((torch.empty(2, 8, device="meta"), Y), ValueError, r"on meta.*\.cpu\(\)"),
        ],
    )
    def test_what_cannot_be_trained_on_is_refused(
        self, batch: Any, error: type[Exception], message: str
    ) -> None:
        with pytest.raises(error, match=message):
            as_batches(batch)

    def test_a_call_is_described_with_shapes_and_dtypes(self) -> None:
        assert describe_call((X, Y)) == "model(float32[4, 8])"
        assert (
            describe_call({"x": X, "flag": True}) == "model(**{'x': float32[4, 8], 'flag': bool})"
        )
        assert describe_call(({"x": X}, Y)) == "model(**{'x': float32[4, 8]})"


class TestDefaultLoss:
    def test_integer_targets_get_cross_entropy(self) -> None:
        output = torch.randn(4, 3)
        torch.testing.assert_close(default_loss(output, (X, Y)), F.cross_entropy(output, Y))

    def test_sequences_are_flattened(self) -> None:
        output, target = torch.randn(2, 5, 7), torch.randint(0, 7, (2, 5))
        expected = F.cross_entropy(output.reshape(10, 7), target.reshape(10))
        torch.testing.assert_close(default_loss(output, (X, target)), expected)

    def test_images_keep_their_class_dimension(self) -> None:
        output, target = torch.randn(2, 3, 5, 6), torch.randint(0, 3, (2, 5, 6))
        expected = F.cross_entropy(output, target)
        torch.testing.assert_close(default_loss(output, (X, target)), expected)

    def test_logits_are_found_in_attributes_and_mappings(self) -> None:
        logits = torch.randn(4, 3)
        expected = F.cross_entropy(logits, Y)
        for output in (SimpleNamespace(logits=logits, loss=None), {"logits": logits}):
            torch.testing.assert_close(default_loss(output, (X, Y)), expected)

    def test_an_outputs_own_loss_comes_first(self) -> None:
        own = torch.tensor(3.0)
        for output in (SimpleNamespace(loss=own), {"loss": own, "logits": X}):
            assert default_loss(output, {"x": X}) is own

    def test_float_targets_get_mean_squared_error_in_fp32(self) -> None:
        output, target = torch.randn(4, 3, dtype=torch.bfloat16), torch.randn(4, 3)
        loss = default_loss(output, (X, target))
        assert loss.dtype == torch.float32
        torch.testing.assert_close(loss, (output.float() - target).square().mean())

    @pytest.mark.parametrize(
        ("output", "batch", "error"),
        [
            (torch.randn(4, 1), (X, torch.randn(4)), ValueError),  # would broadcast to (4, 4)
            (torch.randn(4, 3), (X, torch.randint(0, 3, (5,))), ValueError),
            (torch.randn(4, 3), X, TypeError),
            (torch.randn(4, 3), {"x": X}, TypeError),
            ((torch.randn(4, 3),), (X, Y), TypeError),
        ],
    )
    def test_what_does_not_fit_names_the_remedy(
        self, output: Any, batch: Any, error: type[Exception]
    ) -> None:
        with pytest.raises(error, match="loss=lambda output, batch"):
            default_loss(output, batch)


class TestClasses:
    LAYOUTS = (
        ((4, 3), (4,)),
        ((4, 2, 3), (4, 2)),
        ((4, 3, 5), (4, 5)),
        ((4, 3, 5, 6), (4, 5, 6)),
    )

    @pytest.mark.parametrize("wrong", [3, -1, 10**6])
    @pytest.mark.parametrize(("output", "target"), LAYOUTS)
    def test_a_target_that_is_none_is_named(
        self, output: tuple[int, ...], target: tuple[int, ...], wrong: int
    ) -> None:
        logits, good = torch.randn(output), torch.zeros(target, dtype=torch.int64)
        bad = good.clone()
        bad.view(-1)[-1] = wrong
        message = rf"target has class {wrong}, but the output has 3 classes, 0 to 2: .*-100"
        with pytest.raises(ValueError, match=message):
            default_loss(logits, (X, bad))
        for one in (logits, {"logits": logits}):
            check_targets(one, [(X, good)])
            with pytest.raises(ValueError, match=message):
                check_targets(one, [(X, good), (X, bad)])

    def test_what_the_loss_leaves_out_is_no_class(self) -> None:
        target = torch.tensor([0, -100, 2, -100])
        check_targets(torch.randn(4, 3), [(X, target)])
        assert default_loss(torch.randn(4, 3), (X, target)).isfinite()

    @pytest.mark.parametrize(
        ("output", "batch"),
        [
            (SimpleNamespace(loss=torch.tensor(1.0), logits=torch.randn(4, 2)), (X, Y)),
            (torch.randn(4, 2), {"x": X}),
            (torch.randn(4, 2), (X, torch.full((4, 2), 7.0))),
        ],
    )
    def test_other_losses_have_none(self, output: Any, batch: Any) -> None:
        check_targets(output, [batch])


def test_tensors_are_found_in_nested_outputs() -> None:
    assert [t is X for t in tensors_in({"a": [X, (None, X)], "b": 3})] == [True, True]


def test_units_are_the_first_dimension_of_the_first_tensor() -> None:
    assert units_in((torch.tensor(1.0), X)) == 4
    assert units_in({"x": torch.randn(7, 2)}) == 7


def test_signatures_tell_shapes_apart() -> None:
    assert signature((X, Y)) == signature((X + 1, Y))
    assert signature((X, Y)) != signature((X[:2], Y[:2]))


@pytest.mark.parametrize(
    ("sizes", "accumulation", "steps", "expected"),
    [
        ([4, 4, 4], 1, 5, 5),  # equal shapes: nothing to even out
        ([4, 4, 2], 1, 5, 6),
        ([4, 4, 2], 3, 5, 5),  # a step is a whole pass
        ([4, 4, 2, 4], 2, 3, 4),
        ([4, 2], 3, 1, 2),
    ],
)
def test_turns_are_whole_passes_over_batches_of_different_shapes(
    sizes: list[int], accumulation: int, steps: int, expected: int
) -> None:
    batches = [(X[:size], Y[:size]) for size in sizes]
    assert whole_passes(steps, batches, accumulation) == expected


@pytest.mark.parametrize("target", [torch.tensor(1), 1, 0.5])
def test_a_single_sample_is_no_batch(target: Any) -> None:
    with pytest.raises(ValueError, match=r"no batch dimension\. Put samples into a Dataset"):
        default_loss(torch.randn(3), (torch.randn(8), target))


def test_a_number_of_a_batch_that_is_one_thing() -> None:
    one = torch.tensor(2.0)
    assert default_loss(torch.tensor(1.0), (torch.randn(8, 3), one)) == 1
    with pytest.raises(ValueError, match=r"does not fit .* Put samples into a Dataset"):
        default_loss(torch.randn(1), (torch.randn(8), one))
