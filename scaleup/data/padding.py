"""The length to which a batch is padded."""


def padded_length(longest: int, multiple: int, most: int) -> int:
    """Round the length of a batch's longest example up.

    Args:
        longest: tokens of the longest example.
        multiple: the result is a multiple of it, unless that exceeds `most`.
        most: the length to which examples are cut.
    """
    return max(min(-(-longest // multiple) * multiple, most), longest)
