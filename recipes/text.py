"""A text to learn character by character lives here: tinyshakespeare, or any file; its windows may be changed here.

A token is a byte of the file. In English text that is a character, and any other file works too, with no vocabulary to
be built first.
"""

from __future__ import annotations

from pathlib import Path

import torch
from lightning import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, RandomSampler

Batch = tuple[Tensor, Tensor]  # inputs and targets, both (batch, context): the targets are one token ahead

# A. Karpathy's excerpt of Shakespeare's plays, 1 115 394 characters.
URL = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"
TRAINING_SHARE = 0.9  # the rest, at the end of the text, is for validation


class Windows(Dataset[Batch]):
    """Pieces of a text, each with the same piece one token later.

    Args:
        tokens: The text, ``(length,)``.
        context: Tokens of a piece.
        stride: From one piece's beginning to the next one's.
    """

    def __init__(self, tokens: Tensor, context: int, stride: int) -> None:
        self.tokens = tokens
        self.context = context
        self.stride = stride

    def __len__(self) -> int:
        return (len(self.tokens) - 1 - self.context) // self.stride + 1

    def __getitem__(self, index: int) -> Batch:
        """Return the inputs and the targets of a piece, both ``(context,)``."""
        piece = self.tokens[index * self.stride :][: self.context + 1]
        return piece[:-1], piece[1:]


class TextData(LightningDataModule):
    """One text file, cut into pieces of ``context`` tokens.

    An epoch is as many pieces, begun at random in the first nine tenths of the text, as it takes to read these once;
    validation reads the last tenth in order.

    Args:
        path: The file.
        download: Whether tinyshakespeare may be downloaded to ``path`` if nothing is there.
        context: Tokens of a piece.
        batch_size: Pieces in a batch.
        num_workers: Processes that cut pieces.

    Raises:
        FileNotFoundError: At ``setup``, if there is no file.
        ValueError: At ``setup``, if the file is too short for one piece of each kind.
    """

    def __init__(
        self,
        path: str = "runs/data/tinyshakespeare.txt",
        download: bool = False,
        context: int = 256,
        batch_size: int = 64,
        num_workers: int = 0,
    ) -> None:
        super().__init__()
        self.path = Path(path)
        self.download = download
        self.context = context
        self.batch_size = batch_size
        self.num_workers = num_workers
        self.train: Windows
        self.val: Windows

    def prepare_data(self) -> None:
        """Download tinyshakespeare, if asked to and if there is no file."""
        if self.download and not self.path.exists():
            self.path.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(URL, str(self.path), hash_prefix=SHA256, progress=False)

    def setup(self, stage: str) -> None:
        """Read the file and divide it."""
        if not self.path.is_file():
            raise FileNotFoundError(
                f"There is no file path={str(self.path)!r}. Set `download: true` to download tinyshakespeare there, or "
                "set `path` to any text file."
            )
        tokens = torch.tensor(list(self.path.read_bytes()), dtype=torch.int64)
        training = int(TRAINING_SHARE * len(tokens))
        if min(training, len(tokens) - training) < self.context + 1:
            raise ValueError(
                f"path={str(self.path)!r} has {len(tokens)} tokens, of which the last {len(tokens) - training} are for "
                f"validation: too few for one piece of context={self.context}. Give a longer file or a shorter context."
            )
        self.train = Windows(tokens[:training], self.context, stride=1)
        self.val = Windows(tokens[training:], self.context, stride=self.context)

    def train_dataloader(self) -> DataLoader[Batch]:
        pieces = max(1, len(self.train.tokens) // self.context)
        sampler = RandomSampler(self.train, num_samples=min(pieces, len(self.train)))
        return DataLoader(self.train, self.batch_size, sampler=sampler, num_workers=self.num_workers)

    def val_dataloader(self) -> DataLoader[Batch]:
        return DataLoader(self.val, self.batch_size, num_workers=self.num_workers)
