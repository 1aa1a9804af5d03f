"""Logits, decisions and version to one line of JSON: {"toxic", "labels", "scores", "version"}."""

import json
from pathlib import Path

import numpy as np
import triton_python_backend_utils as pb_utils
from integrity import changed
from labels import LABELS, answer

INPUTS = ("logits", "decisions", "model_version")


class TritonPythonModel:
    def initialize(self, args):
        if complaint := changed(Path(args["model_repository"]) / args["model_version"]):
            raise pb_utils.TritonModelException(complaint)

    def execute(self, requests):
        return [
            self.response(*(pb_utils.get_input_tensor_by_name(r, name).as_numpy() for name in INPUTS)) for r in requests
        ]

    def response(self, logits, decisions, versions):
        if not np.isfinite(logits).all():
            return pb_utils.InferenceResponse(error=pb_utils.TritonError("the classifier's logits are not finite"))
        scores = 1 / (1 + np.exp(-logits.astype(np.float64)))
        lines = [
            json.dumps(
                {
                    **answer(decided),
                    "scores": dict(zip(LABELS, np.round(row, 6).tolist())),
                    "version": int(version),
                }
            ).encode()
            for decided, row, version in zip(decisions, scores, versions.ravel())
        ]
        return pb_utils.InferenceResponse([pb_utils.Tensor("answer", np.array(lines, dtype=object).reshape(-1, 1))])
