"""What a registered version does when it is loaded: `mlflow.pyfunc.load_model("models:/toxic_classificator@champion")`.

Logged as code, not as a pickle. The version holds adapter, head, thresholds and tokenizer; the base model is found by
name, as in training (in the workspace that is TOXIC_WORKSPACE, or ./workspace), and checked by hash.
"""

import os
import shutil
import tempfile
from pathlib import Path

from mlflow.models import set_model
from mlflow.pyfunc import PythonModel
from pydantic import BaseModel


class Answer(BaseModel):
    """What `predict` says to one message; MLflow takes the version's signature from here."""

    toxic: bool
    labels: list[str]


class Classifier(PythonModel):
    def load_context(self, context) -> None:
        from tasks.training import checkpoint, model

        workspace = Path(os.environ.get("TOXIC_WORKSPACE", "workspace")).absolute()
        with tempfile.TemporaryDirectory() as place:
            folder = Path(shutil.copytree(context.artifacts["checkpoint"], place, dirs_exist_ok=True))
            checkpoint.add_merged(folder, workspace)
            self.network, self.tokenizer = model.load_merged(folder)
            self.thresholds = checkpoint.thresholds(folder)
            self.max_length = checkpoint.settings(folder)["max_length"]

    def predict(self, context, model_input: list[str], params=None) -> list[Answer]:
        """Answers `{"toxic": bool, "labels": [str]}`, plain dicts, one per message."""
        from tasks.serving import predict

        return predict.classify(self.network, self.tokenizer, self.thresholds, self.max_length, model_input)


set_model(Classifier())
