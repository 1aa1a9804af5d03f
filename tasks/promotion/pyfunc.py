"""What a registered version does when it is loaded: `mlflow.pyfunc.load_model("models:/toxic_classificator@champion")`.

Logged as code, not as a pickle. The version holds adapter, head, thresholds and tokenizer, whose signature is checked
before any of them is read (with TOXIC_VERIFY_KEY, or the workspace's key); the base model is found by name, as in
training (in the workspace that is TOXIC_WORKSPACE, or ./workspace), and checked by hash.

MLflow runs this very file to load the version: whoever could change it needs no checkpoint. `python commands.py verify`
checks a version before that.
"""

import os
import shutil
import tempfile
from pathlib import Path

import pandas as pd
from mlflow.models import set_model
from mlflow.pyfunc import PythonModel


class Classifier(PythonModel):
    def load_context(self, context) -> None:
        from tasks.promotion import signatures
        from tasks.training import checkpoint, model

        workspace = Path(os.environ.get("TOXIC_WORKSPACE", "workspace")).absolute()
        with tempfile.TemporaryDirectory() as place:
            folder = Path(shutil.copytree(context.artifacts["checkpoint"], place, dirs_exist_ok=True))
            signatures.require_folder(workspace, folder)
            checkpoint.add_merged(folder, workspace)
            self.network, self.tokenizer = model.load_merged(folder)
            self.thresholds = checkpoint.thresholds(folder)
            self.settings = checkpoint.settings(folder)

    def predict(self, context, model_input: pd.DataFrame, params=None) -> list[dict]:
        """Answers `{"toxic": bool, "labels": [str]}`, one per message; MLflow makes one column of the caller's list."""
        from tasks.serving import predict

        messages = model_input.iloc[:, 0].tolist()
        return predict.classify(self.network, self.tokenizer, self.thresholds, self.settings, messages)


set_model(Classifier())
