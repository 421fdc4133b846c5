"""3 x 3 convolutions with frozen weights in a quarter of the multiplications (Winograd's F(4 x 4, 3 x 3)), on CPUs.

A tile of 4 x 4 outputs needs 6 x 6 inputs d and the kernel g: y = Aᵀ [(G g Gᵀ) ⊙ (Bᵀ d B)] A (Lavin and Gray, CVPR
2016). The ⊙ is summed over channels: 36 matrix products of (tiles, C) by (C, K), 2.25 multiplications per output and
channel instead of 9. G g Gᵀ is computed once, as the weights are frozen. The transforms of inputs and outputs cost
additions in proportion to C + K where the products save in proportion to C·K: it pays from about 128 channels on.

The result differs from the direct sum by rounding, a few times more than two orders of direct summation do.
"""

import torch
import torch.nn.functional as F

TILE, PATCH = 4, 6
G = (
    (1 / 4, 0, 0),
    (-1 / 6, -1 / 6, -1 / 6),
    (-1 / 6, 1 / 6, -1 / 6),
    (1 / 24, 1 / 12, 1 / 6),
    (1 / 24, -1 / 12, 1 / 6),
    (0, 0, 1),
)
CONSTANT_PLANE = 7  # row 1, column 1: the one product that enters all 16 outputs of its tile with weight 1

# nanoseconds on one AVX-512 core, measured: a multiply-add of a direct convolution and of the matrix products, and the
# transforms of one element of the 36 planes
DIRECT_NS, PRODUCT_NS, INPUT_NS, OUTPUT_NS = 0.0167, 0.0206, 1.9, 1.3


FEWEST_TILES = 32  # rows that a matrix product needs to run well


def available():
    """Whether this build of torch has the packed matrix products that `convolve` is made of."""
    return hasattr(torch.ops.mkldnn, "_linear_pointwise") and hasattr(torch.ops.mkldnn, "_reorder_linear_weight")


def pays(samples, size, channels_in, channels_out):
    """Whether H x W ``size`` outputs of that many samples are computed faster this way."""
    tiles = _tiles(size[0]) * _tiles(size[1])
    if samples * tiles < FEWEST_TILES or not available():
        return False
    planes = PATCH**2 * tiles
    products = planes * (channels_in * channels_out * PRODUCT_NS + channels_in * INPUT_NS + channels_out * OUTPUT_NS)
    return products < 9 * size[0] * size[1] * channels_in * channels_out * DIRECT_NS


def transform_weight(weight):
    """G g Gᵀ of a kernel (K, C, 3, 3) as 36 packed matrices (K, C), column by column, computed in float64."""
    g = torch.tensor(G, dtype=torch.float64)
    both_axes = torch.kron(g, g)  # (36, 9), row by row; the kernel is transposed to have it column by column
    planes = both_axes @ weight.double().transpose(2, 3).reshape(-1, 9).T
    planes = planes.to(weight.dtype).view(PATCH**2, *weight.shape[:2])
    return [torch.ops.mkldnn._reorder_linear_weight(plane) for plane in planes]


def convolve(x, planes, bias, padding):
    """Convolve x (n, C, H, W), channels-last, with stride 1 and the kernel that ``planes`` are made of.

    Returns
    -------
    Tensor (n, K, H + 2·padding[0] − 2, W + 2·padding[1] − 2), channels-last
    """
    height, width = x.shape[2] + 2 * padding[0] - 2, x.shape[3] + 2 * padding[1] - 2
    rows, columns = _tiles(height), _tiles(width)
    bottom = rows * TILE + 2 - x.shape[2] - padding[0]
    right = columns * TILE + 2 - x.shape[3] - padding[1]
    x = x.permute(0, 2, 3, 1)
    if any((*padding, bottom, right)):
        x = F.pad(x, (0, 0, padding[1], right, padding[0], bottom))
    # the planes' axis order: column of the patch, row of the patch, sample, tile row, tile column, channel
    d = _transform_input(_transform_input(x, 1, rows), 3, columns)
    n, k = len(x), planes[0].shape[0]
    multiply = torch.ops.mkldnn._linear_pointwise
    m = [
        multiply(plane, weight, bias if i == CONSTANT_PLANE else None, "none", [], "").view(n, rows, columns, k)
        for i, (plane, weight) in enumerate(zip(d.view(PATCH**2, -1, d.shape[-1]), planes, strict=True))
    ]
    half = x.new_empty(PATCH, n, rows, columns, TILE, k)
    for row in range(PATCH):
        _transform_output(m[row::PATCH], half[row].unbind(3))
    y = x.new_empty(n, rows, TILE, columns, TILE, k)
    _transform_output(half.unbind(0), y.unbind(2))
    y = y.view(n, rows * TILE, columns * TILE, k)[:, :height, :width]
    return y.permute(0, 3, 1, 2).contiguous(memory_format=torch.channels_last)


def _tiles(size):
    return -(-size // TILE)


def _transform_input(x, dim, tiles):
    """Bᵀ along one axis: the 6 combinations of the 6 inputs of each tile, in a new leading axis."""
    stop = TILE * (tiles - 1) + 1
    index = (slice(None),) * dim
    p = [x[(*index, slice(i, i + stop, TILE))] for i in range(PATCH)]
    out = x.new_empty(PATCH, *p[0].shape)
    even, odd = torch.sub(p[4], p[2], alpha=4), torch.sub(p[3], p[1], alpha=4)
    torch.add(even, odd, out=out[1])
    torch.sub(even, odd, out=out[2])
    torch.sub(p[4], p[2], out=even)
    torch.sub(p[3], p[1], out=odd)
    torch.add(even, odd, alpha=2, out=out[3])
    torch.sub(even, odd, alpha=2, out=out[4])
    torch.sub(p[4], p[2], alpha=5, out=out[0]).add_(p[0], alpha=4)
    torch.sub(p[5], p[3], alpha=5, out=out[5]).add_(p[1], alpha=4)
    return out


def _transform_output(m, out):
    """Aᵀ along one axis: 4 outputs, written to ``out``, of 6 products."""
    even, odd = m[1] + m[2], m[1] - m[2]
    even2, odd2 = m[3] + m[4], m[3] - m[4]
    torch.add(m[0], even, out=out[0]).add_(even2)
    torch.add(odd, odd2, alpha=2, out=out[1])
    torch.add(even, even2, alpha=4, out=out[2])
    torch.add(odd, odd2, alpha=8, out=out[3]).add_(m[5])
