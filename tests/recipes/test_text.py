"""Tests of the text data live here: its windows, its division, and what is said if the file is missing or too short."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from recipes import text
from recipes.text import TextData, Windows


def test_windows_cover_the_text_and_targets_are_one_token_ahead() -> None:
    windows = Windows(torch.arange(12), context=4, stride=4)
    assert len(windows) == 2  # a third one, from 8 to 11, would lack its last target
    inputs, targets = windows[1]
    assert inputs.tolist() == [4, 5, 6, 7]
    assert targets.tolist() == [5, 6, 7, 8]
    assert len(Windows(torch.arange(13), context=4, stride=4)) == 3
    assert len(Windows(torch.arange(12), context=4, stride=1)) == 8
    assert Windows(torch.arange(12), context=4, stride=1)[7][1].tolist() == [8, 9, 10, 11]


def test_an_epoch_reads_the_training_text_once_in_random_pieces(text_file: Path) -> None:
    data = TextData(str(text_file), context=32, batch_size=8)
    data.prepare_data()
    data.setup("fit")
    batches = list(data.train_dataloader())
    inputs, targets = batches[0]
    assert inputs.shape == targets.shape == (8, 32)
    assert inputs.dtype == torch.int64
    assert torch.equal(inputs[:, 1:], targets[:, :-1])
    assert sum(len(batch[0]) for batch in batches) == 1800 // 32
    begins = [torch.cat([inputs[:, 0] for inputs, _ in data.train_dataloader()]) for _ in range(2)]
    assert not torch.equal(*begins)


def test_validation_reads_the_last_tenth_in_order(text_file: Path) -> None:
    data = TextData(str(text_file), context=32, batch_size=8)
    data.setup("fit")
    read = torch.cat([inputs.flatten() for inputs, _ in data.val_dataloader()])
    assert bytes(read.tolist()) == text_file.read_bytes()[1800:][: 32 * 6]


def test_a_byte_is_a_token_in_any_language(tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_text("žluťoučký kůň " * 20, encoding="utf-8")
    data = TextData(str(path), context=8)
    data.setup("fit")
    assert bytes(data.train.tokens.tolist() + data.val.tokens.tolist()).decode() == path.read_text(encoding="utf-8")


def test_tinyshakespeare_is_the_file_that_a_download_is_checked_against(
    shared_file: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = shared_file("tinyshakespeare.txt")
    monkeypatch.setattr(text, "URL", source.as_uri())
    path = tmp_path / "new" / "text.txt"
    data = TextData(str(path), download=True)
    data.prepare_data()
    data.setup("fit")
    assert len(data.train.tokens) + len(data.val.tokens) == 1_115_394
    assert path.read_bytes() == source.read_bytes()


def test_a_file_that_is_there_is_never_downloaded(text_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text, "URL", "nothing:to-be-found")
    before = text_file.read_bytes()
    TextData(str(text_file), download=True).prepare_data()
    assert text_file.read_bytes() == before


def test_another_file_than_tinyshakespeare_is_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other = tmp_path / "other.txt"
    other.write_text("not Shakespeare")
    monkeypatch.setattr(text, "URL", other.as_uri())
    with pytest.raises(RuntimeError, match="invalid hash value"):
        TextData(str(tmp_path / "text.txt"), download=True).prepare_data()
    assert not (tmp_path / "text.txt").exists()


def test_a_missing_file_is_named_with_the_remedies(tmp_path: Path) -> None:
    data = TextData(str(tmp_path / "nothing.txt"))
    data.prepare_data()
    with pytest.raises(FileNotFoundError, match=r"nothing.txt'. Set `download: true` .* set `path` to any text file"):
        data.setup("fit")


def test_a_file_too_short_for_a_piece_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "short.txt"
    path.write_text("x" * 100)
    with pytest.raises(ValueError, match=r"short.txt' has 100 tokens, .* last 10 .* context=10\. Give a longer file"):
        TextData(str(path), context=10).setup("fit")
    TextData(str(path), context=9).setup("fit")
