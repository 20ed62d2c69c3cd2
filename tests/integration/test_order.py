"""In which order runs that wait for a worker are begun."""

import asyncio

import pytest

from support import App, on_both
from temporal_async_task import async_task
from temporal_async_task.task import SubmitOptions


@pytest.mark.slow
@pytest.mark.parametrize(
    ("first", "later"),
    [
        pytest.param(SubmitOptions(priority=5), SubmitOptions(priority=1), id="priority"),
        pytest.param(SubmitOptions(fairness_key="a"), SubmitOptions(fairness_key="b"), id="fairness"),
    ],
)
@on_both
async def test_runs_of_a_better_claim_are_begun_before_those_that_were_submitted_earlier(
    app: App, first: SubmitOptions, later: SubmitOptions
):
    begun = []

    @async_task
    async def shoot(claim: str) -> None:
        begun.append(claim)
        await asyncio.sleep(0.02)  # longer than it takes to queue what a workflow asks for

    await app.connect(shoot)
    ids = [await shoot.submit("first", **first) for _ in range(40)]
    ids += [await shoot.submit("later", **later) for _ in range(4)]
    await app.start(shoot, max_concurrent_tasks=1)
    await asyncio.gather(*map(shoot.result, ids))
    # By turns with the others, or before them; the order is Temporal's, and not exact.
    assert [place for place, claim in enumerate(begun) if claim == "later"][-1] < 20, begun
