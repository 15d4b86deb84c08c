import pytest

from crevnet.frame_size import check_foldable, height_width, in_words


@pytest.mark.parametrize(("size", "pair", "words"), [(64, (64, 64), "64"), ((128, 160), (128, 160), "128 x 160")])
def test_one_number_is_both(size, pair, words):
    assert height_width(size) == pair
    assert in_words(size) == words
    assert in_words((64, 64)) == "64"


@pytest.mark.parametrize(("size", "fold"), [(64, 8), ((8, 24), 8), ((3, 5), 1)])
def test_multiples_of_the_fold_pass(size, fold):
    check_foldable(size, fold, "something")


@pytest.mark.parametrize(("size", "words"), [(12, "12"), ((12, 16), "12 x 16"), ((16, 12), "16 x 12")])
def test_others_are_refused(size, words):
    with pytest.raises(ValueError, match=rf"^model\.image_size {words} is not a multiple of 8, by which you fold$"):
        check_foldable(size, 8, "8, by which you fold")
