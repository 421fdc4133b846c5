"""python train_vm_fast.py --dataset flowers102 --mapping blmpp --seed 0

As train_vm.py, without its pass over the training set before each epoch: the mapping is estimated from the logits
that the training pass before it produced anyway. The first mapping comes from one pass before epoch 0.

The command of the flowers in train_vm.py ends at 42.9 % here, in 2 minutes on two cores.
"""

import sys
from functools import partial

import torch

from cfg import VMFastConfig, parse
from tools.console import no_traceback_when_stopped, user_errors
from tools.training.build import assemble
from tools.training.session import Session


@no_traceback_when_stopped()
def main(argv=None):
    with user_errors():
        cfg = parse(VMFastConfig, __doc__, argv)
    with Session(cfg, assemble, partial(torch.optim.Adam, lr=cfg.lr), schedule="steps") as session:
        trainer = session.trainer
        for epoch in session.epochs():
            if session.mapping.estimated and epoch == 0:
                trainer.estimate(epoch)
            elif session.iterative:
                trainer.refresh(epoch)
            trained = trainer.train(epoch, observe=session.iterative and epoch + 1 < cfg.epochs)
            session.end_epoch(epoch, trained, trainer.evaluate())
        session.finish()


if __name__ == "__main__":
    sys.exit(main())
