"""Where the papers start alpha: one value for models of images, for a LLaMA two by its width."""

import math

# arXiv 2503.10622 v2, section 4 and Derf's paper alike.
IMAGES = 0.5
# Width of the hidden states → alpha before attention and elsewhere: arXiv 2503.10622 v2, section 7 (the table by width;
# its 8196 is 8192 in the code) and, for 5120, that of LLaMA 13B.
_LLAMA = {1024: (1.0, 1.0), 2048: (1.0, 0.5), 4096: (0.8, 0.2), 5120: (0.6, 0.15), 8192: (0.2, 0.05)}


def llama_alphas(width: int) -> tuple[float, float]:
    """Return alpha before attention and elsewhere for a LLaMA of this width, which is at least 1.

    Between two widths of the paper's table both are interpolated on a log-log scale, which is our choice; below 1024
    and above 8192 they are those of the nearest width.
    """
    known = sorted(_LLAMA)
    low = max((one for one in known if one <= width), default=known[0])
    high = min((one for one in known if one >= width), default=known[-1])
    share = 0.0 if low >= high else math.log(width / low) / math.log(high / low)
    attention, other = (start ** (1 - share) * end**share for start, end in zip(_LLAMA[low], _LLAMA[high], strict=True))
    return attention, other
