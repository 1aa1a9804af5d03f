"""Token ids to logits, decisions and the version that made them: `model.onnx` beside this file, in ONNX Runtime."""

from pathlib import Path

import numpy as np
import onnxruntime
import triton_python_backend_utils as pb_utils

INPUTS = ("input_ids", "attention_mask")
OUTPUTS = ("logits", "decisions", "model_version")


class TritonPythonModel:
    def initialize(self, args):
        file = Path(args["model_repository"]) / args["model_version"] / "model.onnx"
        if not file.is_file():
            raise pb_utils.TritonModelException(f"{file} does not exist: `python commands.py export_onnx` writes one")
        options = onnxruntime.SessionOptions()
        # Threads that spin while they wait take the cores from the rest of the ensemble.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        self.session = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])

    def execute(self, requests):
        """Requests that the dynamic batcher joined have the same number of tokens: they are one batch here."""
        inputs = [[pb_utils.get_input_tensor_by_name(r, name).as_numpy() for name in INPUTS] for r in requests]
        try:
            outputs = self.run([np.concatenate(column) for column in zip(*inputs)])
        except Exception as error:
            if len(requests) == 1:
                return [pb_utils.InferenceResponse(error=pb_utils.TritonError(str(error)))]
            # One request with ids outside the vocabulary must not fail those that share its batch.
            return [response for request in requests for response in self.execute([request])]
        ends = np.cumsum([len(ids) for ids, _ in inputs])[:-1]
        return [
            pb_utils.InferenceResponse([pb_utils.Tensor(name, part) for name, part in zip(OUTPUTS, parts)])
            for parts in zip(*(np.split(output, ends) for output in outputs))
        ]

    def run(self, columns):
        return self.session.run(OUTPUTS, dict(zip(INPUTS, columns)))
