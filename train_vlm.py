"""python train_vlm.py --dataset flowers102 --mapping blmpp --seed 0

Reprogram a frozen vision-language model (CLIP, or any other of open_clip): its pretrained labels are 81 prompt
templates filled with the task's class names. The accuracy of the model as it comes is measured first.

Accuracy and time with CLIP's own weights are not measured.
"""

from functools import partial

from tools.console import no_traceback_when_stopped, user_errors  # before torch: it reads what `tools` sets

# isort: split
import torch

from cfg import VLMConfig
from tools.training.build import build_clip
from tools.training.command_line import parse
from tools.training.session import Session


@no_traceback_when_stopped()
def main(argv=None):
    """Train, or go on, or find the run finished; its ``result.json`` as a dict."""
    with user_errors():
        cfg = parse(VLMConfig, __doc__, argv)
    sgd = partial(torch.optim.SGD, lr=cfg.lr, momentum=0.9)
    with Session(cfg, build_clip, sgd, schedule="cosine", command=argv) as session:
        trainer, mapping = session.trainer, session.mapping
        session.measure_zero_shot()
        for epoch in session.epochs():
            due = mapping.estimated and (mapping.iterative or epoch == 0)
            seconds = trainer.estimate(epoch) if due else 0.0
            trained = trainer.train(epoch)
            session.end_epoch(epoch, seconds, trained, trainer.evaluate(epoch))
        return session.finish()


if __name__ == "__main__":
    main()
