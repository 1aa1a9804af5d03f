"""Token ids to logits, decisions and the version that made them: `model.onnx` beside this file, in ONNX Runtime."""

import json
import os
from collections import defaultdict
from pathlib import Path

import numpy as np
import onnxruntime
import triton_python_backend_utils as pb_utils
from integrity import changed

INPUTS = ("input_ids", "attention_mask")
OUTPUTS = ("logits", "decisions", "model_version")


class TritonPythonModel:
    def initialize(self, args):
        folder = Path(args["model_repository"]) / args["model_version"]
        if complaint := changed(folder):
            raise pb_utils.TritonModelException(complaint)
        file = folder / "model.onnx"
        if not file.is_file():
            raise pb_utils.TritonModelException(f"{file} does not exist: `python commands.py export_onnx` writes one")
        buckets = json.loads((folder / "engine.json").read_text(encoding="utf-8"))["buckets"]
        self.max_tokens = buckets[-1]
        instances = sum(group["count"] for group in json.loads(args["model_config"])["instance_group"])
        options = onnxruntime.SessionOptions()
        # The instances share the cores, but for one that the server and the rest of the ensemble need; threads that
        # spin while they wait would take that too.
        options.intra_op_num_threads = max((len(os.sched_getaffinity(0)) - 1) // instances, 1)
        options.log_severity_level = 4  # what a client sends wrong is said to the client, not in the server's log
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        self.session = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
        self.warm_up(buckets)

    def warm_up(self, buckets):
        """Computes every length once before the version counts as ready, so that no client waits for a first time.

        The configuration's model_warmup would do it too, but may end the server where it fails.
        """
        for length in buckets:
            message = np.ones((1, length), dtype=np.int64)
            self.session.run(OUTPUTS, dict.fromkeys(INPUTS, message))

    def execute(self, requests):
        """Requests come as the dynamic batcher has joined them, of any length; those of one length are one batch."""
        responses, batches = [None] * len(requests), defaultdict(list)
        for i, request in enumerate(requests):
            ids, mask = (pb_utils.get_input_tensor_by_name(request, name).as_numpy() for name in INPUTS)
            wrong = self.complaint(ids, mask)
            if wrong:
                responses[i] = refusal(wrong)
            else:
                batches[ids.shape[1]].append((i, ids, mask))
        for batch in batches.values():
            self.answer(batch, responses)
        return responses

    def complaint(self, ids, mask):
        """What is wrong with a request, or None. Ids beyond the vocabulary are refused by ONNX Runtime."""
        if ids.shape != mask.shape:
            return f"input_ids has shape {list(ids.shape)}, attention_mask {list(mask.shape)}: send one mask per id"
        if not 1 <= ids.shape[1] <= self.max_tokens:
            return (
                f"input_ids has {ids.shape[1]} tokens, the model reads 1 to {self.max_tokens}: cut the message, or "
                "send its text to toxic_text, which does"
            )
        if ids.min(initial=0) < 0:
            return f"input_ids has {ids.min()}: ids start at 0"
        return None

    def answer(self, batch, responses):
        """Puts the answers to [(index, input_ids, attention_mask), …], all of one length, at their indices."""
        numbers, *columns = zip(*batch)
        try:
            outputs = self.session.run(OUTPUTS, {name: np.concatenate(c) for name, c in zip(INPUTS, columns)})
        except Exception as error:
            if len(batch) == 1:
                responses[numbers[0]] = refusal(str(error))
                return
            # One request with ids outside the vocabulary must not fail those that share its batch.
            for one in batch:
                self.answer([one], responses)
            return
        start = 0
        for number, ids in zip(numbers, columns[0]):
            end = start + len(ids)
            parts = [pb_utils.Tensor(name, output[start:end]) for name, output in zip(OUTPUTS, outputs)]
            responses[number] = pb_utils.InferenceResponse(parts)
            start = end


def refusal(message):
    return pb_utils.InferenceResponse(error=pb_utils.TritonError(message, pb_utils.TritonError.INVALID_ARG))
