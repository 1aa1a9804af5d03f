"""A reviewer's wish in the registry: whoever sets the alias `approved` there starts `toxicity_release`.

An asset stands for the wish, and Airflow's triggerer watches it: no worker is held, no run a minute fills the list, and
the weekly DAG knows nothing of it. Events say only "look": which version it is, the release asks the registry itself.

One wish starts one release. The trigger remembers in Airflow's database which version it has told of (`TOLD`), so that
it tells once; a release removes the alias and that memory at its end (dags/toxicity_release.py, `settle`), so that the
alias can be set again. A release that could not ask the registry removes that memory alone: the wish is told of again.
Should the triggerer be killed between telling and remembering, it tells twice: the second release waits for the first,
finds the alias gone and is skipped.
"""

import asyncio
import logging
import os

from airflow.sdk import Asset, AssetWatcher
from airflow.triggers.base import BaseEventTrigger, TriggerEvent

from dags import registry

log = logging.getLogger(__name__)

TOLD = "told"
SETTLE_S = 3  # Airflow saves an event within a second


class ApprovalTrigger(BaseEventTrigger):
    """Tells of each version that gets the alias `approved`, once for each time it gets it.

    Args:
        poll_s: seconds between two looks. While the registry does not answer, it goes on looking.
    """

    def __init__(self, poll_s: float):
        super().__init__()
        self.poll_s = poll_s

    def serialize(self):
        return "dags.approvals.ApprovalTrigger", {"poll_s": self.poll_s}

    async def run(self):
        failed = None
        while True:
            try:
                version, told = await registry.approved_version(), await self.asset_state_store.aget(TOLD)
                if version is None and told is not None:  # released, or the reviewer has thought again
                    await self.asset_state_store.adelete(TOLD)
                elif version is not None and version != told:
                    log.info("version %d is approved in the registry", version)
                    yield TriggerEvent({"version": version})
                    await asyncio.sleep(SETTLE_S)  # what is remembered must have been saved
                    await self.asset_state_store.aset(TOLD, version)
                failed = None
            except Exception as error:  # whatever it is, the watch goes on; a long outage is one line in the log
                if failed != (failed := f"{type(error).__name__}: {error}"):
                    log.warning("the watch for approvals goes on in spite of %s", failed)
            await asyncio.sleep(self.poll_s)


APPROVAL = Asset(
    "toxicity_approval",
    watchers=[
        AssetWatcher(
            name="registry", trigger=ApprovalTrigger(poll_s=float(os.environ.get("TOXIC_APPROVAL_POLL_S") or 15))
        )
    ],
)
