import pytest
import torch

from revgrad.errors import ResidueOverflow, ReversibilityError
from revgrad.spilled_words import FixedWords, GrowingWords

MASKS = torch.tensor([[1, 0, 1, 1, 0], [0, 0, 0, 0, 0], [1, 1, 1, 1, 1], [0, 1, 0, 0, 1]]).bool()
WORDS = torch.arange(-10, 10, dtype=torch.int16).view(4, 5)
TOTAL = int(MASKS.sum())


def require(ok, error):
    if not ok:
        raise error()


def both(capacity=TOTAL):
    return GrowingWords(), FixedWords(capacity, require)


def filled(words):
    for word, mask in zip(WORDS, MASKS, strict=True):
        words.append(word, mask)
    return words


def assert_comes_back(words):
    for word, mask in zip(WORDS.flip(0), MASKS.flip(0), strict=True):
        assert torch.equal(words.pop(mask)[mask], word[mask])
    assert len(words) == 0
    assert words.count() == 0


@pytest.mark.parametrize("words", both())
def test_words_come_back_last_in_first_out(words):
    assert (len(filled(words)), words.count()) == (4, TOTAL)
    words.pop(MASKS[3])
    words.append(WORDS[3], MASKS[3])  # on with it
    assert_comes_back(words)


@pytest.mark.parametrize("words", both())
def test_packed_words_come_back_as_often_as_one_likes(words):
    tensors, layout = filled(words).tensors(), words.layout()
    assert not any(isinstance(x, torch.Tensor) for x in (*layout.args, *layout.keywords.values()))
    for _ in range(2):
        assert_comes_back(layout(iter(tensors)))
    assert words.count() == TOTAL


@pytest.mark.parametrize("words", both())
def test_packed_before_the_first_update(words):
    assert len(words.layout()(iter(words.tensors()))) == 0


@pytest.mark.parametrize("words", both(100))
def test_a_clone_is_independent(words):
    other = filled(words).clone()
    other.append(WORDS[0], MASKS[2])
    words.append(WORDS[1], MASKS[2])
    assert torch.equal(other.pop(MASKS[2]), WORDS[0])
    assert torch.equal(words.pop(MASKS[2]), WORDS[1])
    assert_comes_back(other)
    assert_comes_back(words)


@pytest.mark.parametrize("words", both())
def test_another_number_than_was_spilled(words):
    filled(words)
    with pytest.raises(ReversibilityError, match="the residue does not fit the gates"):
        words.pop(MASKS[2])


@pytest.mark.parametrize("words", both())
def test_no_elements(words):
    words.append(WORDS[0, :0], MASKS[0, :0])
    assert words.pop(MASKS[0, :0]).shape == (0,)


def test_growing_words_take_no_more_than_they_are():
    assert sum(x.nbytes for x in filled(GrowingWords()).tensors()) == 2 * TOTAL


def test_what_does_not_fit_is_counted_and_told():
    words = filled(FixedWords(TOTAL - 1, require))
    assert words.count() == TOTAL
    with pytest.raises(ResidueOverflow, match=rf"spilled {TOTAL} words, but there is room for {TOTAL - 1}, .*margin="):
        words.check()
    filled(FixedWords(TOTAL, require)).check()
    FixedWords(0, require).check()


def test_gates_that_do_not_fit_read_and_write_inside_the_buffer():
    """On a GPU an index out of range ends the process."""
    wrong = []
    words = filled(FixedWords(3, lambda ok, error: wrong.append(not ok)))
    for mask in (MASKS[2],) * 4:
        words.pop(mask)
    assert sum(wrong) == 3
