"""Two workers train a Hugging Face model on English text: a small Llama from its configuration, nothing downloaded.

Run ``python examples/huggingface.py``; it needs ``pip install 'lightning-localsgd[huggingface]'``. The text is Python's
language reference, paragraph by paragraph, which comes with Python. It ends with the bits per byte on paragraphs that
were held out, and fails above 3.4.
"""

import argparse
import math
import sys
import warnings
from pydoc_data.topics import topics

import torch
from lightning.pytorch import LightningDataModule, LightningModule, Trainer, seed_everything
from lightning.pytorch.overrides.distributed import UnrepeatedDistributedSampler
from torch import Tensor
from torch.utils.data import DataLoader
from torchmetrics import MeanMetric
from transformers import ByT5Tokenizer, DataCollatorForLanguageModeling, LlamaConfig, LlamaForCausalLM

from lightning_localsgd import LocalSGDStrategy

Batch = dict[str, Tensor]  # "input_ids", "attention_mask" and "labels", each (b, t), filled up to the longest of them
LONGEST = 128  # bytes of a paragraph that are read


class Paragraphs(LightningDataModule):
    """Paragraphs of Python's language reference, each once, as numbers; every tenth is held out.

    Args:
        batch_size: paragraphs in a batch of one worker.
    """

    def __init__(self, batch_size: int = 16) -> None:
        super().__init__()
        self.batch_size = batch_size
        self.tokenizer = ByT5Tokenizer(extra_ids=0)  # one number for each byte: there is no vocabulary to download
        self.collate = DataCollatorForLanguageModeling(self.tokenizer, mlm=False)

    def setup(self, stage: str) -> None:
        texts = (text.strip()[: LONGEST - 1] for topic in topics.values() for text in topic.split("\n\n"))
        paragraphs = [
            self.tokenizer(text, truncation=True, max_length=LONGEST)
            for text in dict.fromkeys(texts)  # topics quote each other
            if len(text) > 40
        ]
        self.test = paragraphs[5::10]
        self.train = [paragraph for number, paragraph in enumerate(paragraphs) if number % 10 != 5]

    def train_dataloader(self) -> DataLoader[Batch]:
        # Lightning deals the paragraphs over the workers, as with DDP.
        return DataLoader(self.train, self.batch_size, shuffle=True, drop_last=True, collate_fn=self.collate)

    def test_dataloader(self) -> DataLoader[Batch]:
        assert self.trainer is not None
        sampler = UnrepeatedDistributedSampler(  # each paragraph once, as in digits.py
            self.test, num_replicas=self.trainer.world_size, rank=self.trainer.global_rank, shuffle=False
        )
        return DataLoader(self.test, batch_size=64, sampler=sampler, collate_fn=self.collate)


class LanguageModel(LightningModule):
    """Llama, made small: with its defaults, 0.29 million parameters, which start random.

    Args:
        width: numbers by which a byte is described.
        layers: how many blocks.
        lr: AdamW's learning rate, reached after a tenth of the run, from where it falls to zero.
    """

    def __init__(self, width: int = 96, layers: int = 2, lr: float = 0.005) -> None:
        super().__init__()
        self.save_hyperparameters()
        config = LlamaConfig(
            vocab_size=259,  # bytes, and what marks filling, the end and the unknown
            hidden_size=width,
            intermediate_size=3 * width,
            num_hidden_layers=layers,
            num_attention_heads=4,
            max_position_embeddings=LONGEST,
            pad_token_id=0,
            bos_token_id=None,
            eos_token_id=1,
        )
        self.model = LlamaForCausalLM(config)
        self.test_bits = MeanMetric()

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        loss = self.model(**batch).loss
        self.log("loss", loss, prog_bar=True)
        return loss

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        guessed = batch["attention_mask"][:, 1:].sum()  # all bytes but the first of each paragraph, and its end
        self.test_bits(self.model(**batch).loss / math.log(2), weight=guessed)
        self.log("test_bits", self.test_bits)
        self.log("test_paragraphs", float(len(batch["labels"])), reduce_fx="sum", sync_dist=True)

    def configure_optimizers(self) -> dict[str, object]:
        optimizer = torch.optim.AdamW(self.parameters(), lr=self.hparams.lr, weight_decay=0.1)
        steps = self.trainer.estimated_stepping_batches

        def rise_and_fall(step: int) -> float:
            return min(10 * (step + 1) / steps, 1 - step / steps)

        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rise_and_fall)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    options.add_argument("--workers", type=int, default=2, help="processes")
    options.add_argument("--period", type=int, default=16, help="steps between two averages")
    options.add_argument("--epochs", type=int, default=6, help="times that the text is gone through")
    options.add_argument("--width", type=int, default=96, help="of the model")
    options.add_argument("--at-most", type=float, default=3.4, help="bits per byte; with more it fails")
    options.add_argument("--seed", type=int, default=0, help="of the first model and the order of the text")
    args = options.parse_args()

    warnings.filterwarnings("ignore", ".*does not have many workers.*")  # the text is in memory
    seed_everything(args.seed)
    trainer = Trainer(
        accelerator="cpu",
        devices=args.workers,
        strategy=LocalSGDStrategy(period=args.period),
        max_epochs=args.epochs,
        log_every_n_steps=10,
        logger=False,
        enable_checkpointing=False,
    )
    model, data = LanguageModel(width=args.width), Paragraphs()
    trainer.fit(model, data)
    (result,) = trainer.test(model, data, verbose=False)

    if trainer.is_global_zero:
        bits = result["test_bits"]
        print(f"held-out text: {bits:.3f} bits per byte on {result['test_paragraphs']:.0f} paragraphs")
        if bits > args.at_most:
            sys.exit(f"this is above {args.at_most}, which the example is meant to stay below")


if __name__ == "__main__":
    main()
