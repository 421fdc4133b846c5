"""python train_vm_fast.py --dataset flowers102 --mapping blmpp --seed 0

As train_vm.py, without its pass over the training set before each epoch: the mapping is estimated from the logits
that the training pass before it produced anyway. The first mapping comes from one pass before epoch 0.

The command of the flowers in train_vm.py ends at 42.9 % here, in 2 minutes on two cores.
"""

from functools import partial

from tools.console import no_traceback_when_stopped, user_errors  # before torch: it reads what `tools` sets

# isort: split
import torch

from cfg import VMFastConfig
from tools.training.build import build_vision
from tools.training.command_line import parse
from tools.training.session import Session


@no_traceback_when_stopped()
def main(argv=None):
    """Train, or go on, or find the run finished; its ``result.json`` as a dict."""
    with user_errors():
        cfg = parse(VMFastConfig, __doc__, argv)
    adam = partial(torch.optim.Adam, lr=cfg.lr)
    with Session(cfg, build_vision, adam, schedule="steps", command=argv) as session:
        trainer, mapping = session.trainer, session.mapping
        for epoch in session.epochs():
            seconds = 0.0
            if mapping.estimated and epoch == 0:
                seconds = trainer.estimate(epoch)
            elif mapping.iterative:
                seconds = trainer.refresh(epoch)
            trained = trainer.train(epoch, observe=mapping.iterative and epoch + 1 < cfg.epochs)
            session.end_epoch(epoch, seconds, trained, trainer.evaluate(epoch))
        return session.finish()


if __name__ == "__main__":
    main()
