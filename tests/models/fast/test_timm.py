"""python -m tests.models.fast.test_timm [ARCHITECTURE ...]

Fast and plain path of timm's architectures: random weights, padding and watermarking, batches of 1, 3 and 8 images.

Where they differ by more than `ROUNDING`, the same comparison in float64 decides. A ReLU that rounding turns over
changes a gradient in more than its last digits, `TURNED` at most; in float64 none does, and a fault would stay.
"""

import gc
import re
import sys
import time
from collections import Counter
from copy import deepcopy
from functools import partial

import pytest
import torch

from models import PaddingVR, WatermarkingVR
from models.fast.network import build_network
from tests.models.fast.test_network import MEAN, STD, images_for, settle, with_random_program

BATCHES = (1, 3, 8)
ROUNDING, TURNED, ROUNDING_64 = (1e-5, 1e-3), (1e-4, 1e-1), (1e-6, 1e-9)  # of logits (kept in float32), of the gradient
CANVASES = (96, 128, 192, 224, 256)  # pixels; the first that a model takes
# how the table abbreviates the description of a network
SHORTER = (
    (r"fast path: channels-last, fold-batchnorm", "fast"),
    (r", fused-ops|, no (first|shared|winograd)[^,]*| layers", ""),
    (r"(shared-border|winograd) (over|in)", r"\1"),
    (r"as the code of this network cannot be recorded ahead", "not recorded"),
    (r": same results, slower", ""),
)
ARCHITECTURES = """
    botnet26t_256 cait_xs24_384 cait_xxs24_224 coat_lite_tiny coat_tiny coatnet_nano_cc_224 coatnet_pico_rw_224
    convit_small convit_tiny convmixer_768_32 convnext_zepto_rms cpubone_nano cpubone_t0 crossvit_9_240
    crossvit_tiny_240 cs3darknet_focus_s csatv2 cspnext_s cspnext_tiny darknet17 davit_tiny
    deit_tiny_distilled_patch16_224 deit_tiny_patch16_224 densenet121 densenetblur121d dla46x_c dpn48b
    eca_botnext26ts_256 eca_halonext26ts eca_resnext26ts ecaresnet26t ecaresnext26t_32x4d edgenext_x_small
    edgenext_xx_small efficientformer_l1 efficientformerv2_s0 efficientvim_m1 efficientvit_b0 efficientvit_m0
    ese_vovnet19b_slim_dw eva02_tiny_patch14_224 fasternet_t0 fastvit_s12 fastvit_t8 focalnet_tiny_lrf
    focalnet_tiny_srf gcvit_xtiny gcvit_xxtiny gernet_s ghostnet_050 ghostnetv3_050 gmixer_12_224 gmlp_ti16_224
    halonet26t halonet_h1 haloregnetz_b hardcorenas_a hardcorenas_b hgnet_tiny hgnetv2_b0 hiera_tiny_224
    hrnet_w18_small iformer_s iformer_t inception_next_atto inception_next_tiny inception_v3 lambda_resnet26t
    lcnet_035 lcnetv2_small legacy_seresnet18 legacy_seresnext26_32x4d legacy_xception levit_128s levit_conv_128s
    lowformer_b0 lowformer_e1 mambaout_femto maxvit_pico_rw_256 maxvit_rmlp_pico_rw_256 mnasnet_050 mnasnet_small
    mobilenetv2_035 mobilenetv3_large_075 mobilenetv3_small_050 mobileone_s1 mobilevit_xxs mobilevitv2_050
    mvitv2_tiny nest_tiny nest_tiny_jx nextvit_small nf_ecaresnet26 nf_regnet_b0 nf_resnet26 pit_ti_224
    pit_ti_distilled_224 poolformer_s12 poolformerv2_s12 pvt_v2_b0 rdnet_tiny regnetx_002 regnety_002 regnetz_b16
    repghostnet_050 repvgg_a0 repvit_m1 res2next50 resnest14d resnet10t resnet18 resnet50 resnetaa34d resnetblur18
    resnetv2_18 resnext101_32x8d resnext26ts resnext50_32x4d rexnet_100 rexnetr_100 sam2_hiera_tiny sebotnet33ts_256
    semnasnet_050 sequencer2d_s seresnet18 seresnext26t_32x4d shvit_s1 skresnet18 skresnext50_32x4d starnet_s050
    swiftformer_s swiftformer_xs swin_s3_tiny_224 swin_tiny_patch4_window7_224 swinv2_cr_tiny_224
    swinv2_tiny_window8_256 test_byobnet test_coatnet test_convnext test_efficientnet test_efficientnet_evos
    test_efficientnet_gn test_efficientnet_ln test_mambaout test_maxvit test_nfnet test_resnet test_vit
    test_vit_relpos tf_efficientnet_lite0 tiny_vit_5m_224 tinynet_e tnt_s_legacy_patch16_224 tnt_s_patch16_224
    twins_pcpvt_small twins_svt_small vgg11 visformer_tiny vit_srelpos_small_patch16_224 vit_tiny_patch16_224
    vit_tiny_patch16_dinov3_qkvb vit_tiny_r_s16_p8_224 vit_wee_patch16_reg1_gap_256 vit_xsmall_patch16_clip_224
    vitamin_small_224 volo_d1_224 vovnet39a xception41p xcit_nano_12_p16_224 xcit_nano_12_p8_224 xcit_tiny_12_p8_224
""".split()


def build(name):
    """A randomly initialised model and the side of its canvas."""
    from models.torchvision_shim import ensure_torchvision

    ensure_torchvision()
    import timm

    for size in CANVASES:
        for options in ({}, {"img_size": size}):
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(0)
                try:
                    net = settle(timm.create_model(name, **options))
                    with torch.no_grad():
                        for weight in net.parameters():
                            if not weight.any():  # a head of zeros would hide everything before it
                                weight.normal_(std=0.02)
                        net(torch.zeros(2, 3, size, size))
                    return net, size
                except Exception:  # each architecture refuses a size in its own way
                    continue
    raise ValueError(f"{name} takes none of the canvases {CANVASES}")


def results(path, input_vr, images, sizes):
    """Logits (n, S) and gradient of the program, of the first n images, for each n of ``sizes``."""
    logits = path(images)
    weights = torch.randn(max(BATCHES), logits.shape[1], generator=torch.Generator().manual_seed(3)).to(logits)
    pairs = {}
    for n in sizes:
        loss = (logits[:n] * weights[:n]).sum()
        (gradient,) = torch.autograd.grad(loss, input_vr.program, retain_graph=n != sizes[-1])
        pairs[n] = logits[:n].detach().double(), gradient.double()
    return pairs


def difference(net, input_vr, dtype=torch.float32):
    """The fast network, and how far its logits and gradient are off, relatively, the largest of all batches."""
    input_vr = with_random_program(input_vr, dtype)
    images = images_for(input_vr, max(BATCHES))
    network = build_network(net, input_vr)
    plain = results(lambda x: net(input_vr(x)).float(), input_vr, images, BATCHES)
    worst = [0.0, 0.0]
    for n in BATCHES:
        fast = results(network, input_vr, images[:n], (n,))
        for i, (a, b) in enumerate(zip(fast[n], plain[n], strict=True)):
            assert b.norm() > 0
            worst[i] = max(worst[i], ((a - b).norm() / b.norm()).item())
    return network, worst


def compare(name):
    """Compare the paths under either input VR.

    Yields
    ------
    (str, str, bool, str)
        Input VR, description of the network, whether the paths agree to rounding, and the relative differences of
        logits and gradient.
    """
    net, size = build(name)
    for kind, input_vr in (
        ("padding", PaddingVR(size, size // 3, MEAN, STD)),
        ("watermarking", WatermarkingVR(size, size // 8, MEAN, STD)),
    ):
        network, off = difference(net, input_vr)
        figures, agree = "{:.0e} {:.0e}".format(*off), all(map(float.__le__, off, ROUNDING))
        if not agree and all(map(float.__le__, off, TURNED)):
            _, off = difference(deepcopy(net).double(), deepcopy(input_vr), torch.float64)
            figures += "; in float64 {:.0e} {:.0e}".format(*off)
            agree = all(map(float.__le__, off, ROUNDING_64))
        yield kind, network.description, agree, figures


@pytest.mark.soak
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_logits_and_gradient_are_those_of_the_plain_path(name):
    for kind, description, agree, figures in compare(name):
        assert agree, f"{kind}: {description}: {figures}"


def main(names):
    """Print the table as it comes, then the counts."""
    names, counts, start = names or ARCHITECTURES, Counter(), time.perf_counter()
    say = partial(print, flush=True)
    say("architecture | input VR | path (fast: channels-last, fold-batchnorm, fused-ops too) | logits, gradient off")
    for name in names:
        gc.collect()  # graphs are cycles, which hold on to their weights
        for kind, description, agree, figures in compare(name):
            counts[description.partition(" path")[0] + " path"] += 1
            counts["first layer alone"] += "alone" in description
            counts["parts left out"] += "left out" in description
            counts["differences beyond rounding"] += not agree
            for long, short in SHORTER:
                description = re.sub(long, short, description)
            say(f"{name} | {kind} | {description} | {figures}{'' if agree else ' !'}")
    minutes = (time.perf_counter() - start) / 60
    say(f"{len(names)} architectures under two input VRs, {minutes:.0f} minutes: {dict(counts)}")


if __name__ == "__main__":
    main(sys.argv[1:])
