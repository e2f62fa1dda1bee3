"""The evaluator: batches, what is left of them, and the mode of the policy."""

from __future__ import annotations

from collections.abc import Sequence

from spg.evaluation.completer import Completer
from spg.evaluation.evaluator import Completion, Evaluator, Item, evaluate
from spg.rollout.decoder import Decoder
from spg.tasks.sudoku import Sudoku
from tests.helpers import small_policy


def test_a_batch_is_completed_whole_and_measured_where_it_is_wanted() -> None:
    task = Sudoku(eval_size=4)
    items = [Item(i, s, example) for i, example in enumerate(task.examples("test")) for s in range(2)]
    asked: list[list[tuple[int, int]]] = []

    def complete(batch: Sequence[Item]) -> list[Completion]:
        asked.append([(item.index, item.sample) for item in batch])
        return [Completion(None, f"{item.index}-{item.sample}") for item in batch]

    evaluator = Evaluator(complete, task, 3)
    left = {(1, 1), (3, 1)}
    found = list(evaluator.batches(items, lambda item: (item.index, item.sample) in left))
    assert asked == [[(1, 1), (2, 0), (2, 1)], [(3, 0), (3, 1)]]
    assert [[result.completion.text for result in batch] for batch in found] == [["1-1"], ["3-1"]]
    assert found[0][0].measures == task.measure(items[3].example, "1-1")
    whole = list(evaluator.batches(items))
    assert [len(batch) for batch in whole] == [3, 3, 2]


def test_completions_are_decoded_in_evaluation_mode_and_say_how() -> None:
    policy, task = small_policy(), Sudoku(eval_size=3)
    policy.train()
    decoder = Decoder(24, 12, 8, temperature=0.0)
    examples = task.examples("test")
    found = Completer(policy, decoder, task)([Item(i, 0, example) for i, example in enumerate(examples)])
    assert policy.training
    for completion, example in zip(found, examples, strict=True):
        assert completion.prompt == task.prompt(example)
        assert completion.decoded == example["puzzle"].count("0")
        assert 1 <= (completion.steps or 0) <= 8
        assert completion.near_ties is None, "the decoder did not look for any"
    result = evaluate(Completer(policy, decoder, task), task, examples, 2)
    assert result.texts == tuple(completion.text for completion in found)
