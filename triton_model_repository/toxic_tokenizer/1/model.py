"""Text to token ids, cleaned and cut as in training. Any bytes get ids: an empty message gets one padding token."""

import json
import os
from pathlib import Path

import numpy as np
import triton_python_backend_utils as pb_utils
from integrity import changed
from text import LONGEST, clean_start
from tokenizers import Tokenizer

os.environ["TOKENIZERS_PARALLELISM"] = "false"  # several instances share the cores, not the threads of each


class TritonPythonModel:
    def initialize(self, args):
        folder = Path(args["model_repository"]) / args["model_version"]
        if complaint := changed(folder):
            raise pb_utils.TritonModelException(complaint)
        settings = json.loads((folder / "settings.json").read_text(encoding="utf-8"))
        self.max_chars, self.pad_id, self.buckets = settings["max_chars"], settings["pad_id"], settings["buckets"]
        self.tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        self.tokenizer.no_padding()
        self.tokenizer.enable_truncation(settings["max_length"])
        self.tokenizer.encode_batch_fast(["the first message takes longer than those that follow"])

    def execute(self, requests):
        """All messages of the joined requests are encoded at once; each request is padded by itself, or refused."""
        batches = [pb_utils.get_input_tensor_by_name(r, "text").as_numpy().ravel() for r in requests]
        fit = [all(len(text) <= LONGEST for text in batch) for batch in batches]
        texts = [
            clean_start(text.decode("utf-8", errors="replace"), self.max_chars)
            for batch, fits in zip(batches, fit)
            for text in (batch if fits else ())
        ]
        rows = iter(self.tokenizer.encode_batch_fast(texts))
        return [
            self.response([next(rows).ids or [self.pad_id] for _ in batch]) if fits else self.refusal(batch)
            for batch, fits in zip(batches, fit)
        ]

    def refusal(self, batch):
        complaint = f"a message has {max(map(len, batch))} bytes, {LONGEST} is the most that is taken: shorten it"
        return pb_utils.InferenceResponse(error=pb_utils.TritonError(complaint, pb_utils.TritonError.INVALID_ARG))

    def response(self, rows):
        """Padded to a bucket rather than to the longest row: only requests of equal length can share a batch."""
        longest = max((len(row) for row in rows), default=0)
        width = next(bucket for bucket in self.buckets if bucket >= longest)
        ids = np.full((len(rows), width), self.pad_id, dtype=np.int64)
        mask = np.zeros((len(rows), width), dtype=np.int64)
        for i, row in enumerate(rows):
            ids[i, : len(row)] = row
            mask[i, : len(row)] = 1
        return pb_utils.InferenceResponse([pb_utils.Tensor("input_ids", ids), pb_utils.Tensor("attention_mask", mask)])
