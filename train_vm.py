"""python train_vm.py --dataset flowers102 --mapping blm --seed 0

Reprogram a frozen vision model: train an input pattern while the mapping from pretrained to downstream labels is
estimated again before every epoch (Cai et al., "Bayesian-guided Label Mapping for Visual Reprogramming", 2024).

With --backbone efficientnet_lite0 --mapping blmpp --epochs 10 --batch-size 64, the real images of 89 of the 102
flowers end at 44.8 % of the test images, in 3 to 6 minutes on two cores. The published recipe is not measured.
"""

from functools import partial

from tools.console import no_traceback_when_stopped, user_errors  # before torch: it reads what `tools` sets

# isort: split
import torch

from cfg import VMConfig
from tools.training.build import build_vision
from tools.training.command_line import parse
from tools.training.session import Session


@no_traceback_when_stopped()
def main(argv=None):
    """Train, or go on, or find the run finished; its ``result.json`` as a dict."""
    with user_errors():
        cfg = parse(VMConfig, __doc__, argv)
    adam = partial(torch.optim.Adam, lr=cfg.lr)
    with Session(cfg, build_vision, adam, schedule="steps", command=argv) as session:
        trainer, mapping = session.trainer, session.mapping
        for epoch in session.epochs():
            due = mapping.estimated and (mapping.iterative or epoch == 0)
            seconds = trainer.estimate(epoch) if due else 0.0
            trained = trainer.train(epoch)
            session.end_epoch(epoch, seconds, trained, trainer.evaluate(epoch))
        return session.finish()


if __name__ == "__main__":
    main()
