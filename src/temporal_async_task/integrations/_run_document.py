"""What the router says of a run: a `TaskResult` as a JSON document, described for each task."""

from __future__ import annotations

import base64
import json
import logging
from dataclasses import fields
from datetime import datetime
from typing import Any

from fastapi.exceptions import RequestValidationError
from pydantic import Base64Bytes, BaseModel, ConfigDict, Field, TypeAdapter, ValidationError, create_model
from pydantic.errors import PydanticInvalidForJsonSchema, PydanticSchemaGenerationError, PydanticUserError
from pydantic_core import to_json

from temporal_async_task.errors import ConfigError
from temporal_async_task.status import StepState, TaskResult, TaskStatus
from temporal_async_task.task import TemporalAsyncTask

logger = logging.getLogger("temporal_async_task")

_NULL = b"null"
_BYTES: Any = Base64Bytes
_NOT_DESCRIBABLE = (PydanticSchemaGenerationError, PydanticInvalidForJsonSchema, PydanticUserError)


class StepDocument(BaseModel):
    """One step of a run."""

    model_config = ConfigDict(from_attributes=True)

    key: str
    state: StepState
    attempts: int = Field(description="Calls that were made, the running one included")
    started_at: datetime | None
    finished_at: datetime | None
    last_error: str | None
    next_attempt_at: datetime | None = Field(description="When it is due again, while it backs off or waits")
    child_task_id: str | None = Field(description="The run that it has submitted, if it is a task itself")


class RunSummary(BaseModel):
    """A run, without its result."""

    model_config = ConfigDict(from_attributes=True)

    task: str = Field(description="The task's name")
    task_id: str
    status: TaskStatus
    error: str | None = Field(description="Why it failed; of a completed run: why its result cannot be shown")
    error_type: str | None
    created_at: datetime | None
    started_at: datetime | None = Field(description="When the first attempt began")
    completed_at: datetime | None = Field(description="When it ended, with a result or without")
    current_step: str | None
    completed_steps: list[str]
    steps: list[StepDocument]
    attempt: int
    last_error: str | None
    next_retry_at: datetime | None
    progress: float | None = Field(description="0 to 1")
    progress_message: str | None


class RunDocuments:
    """The documents of one task's runs.

    Args:
        task: The task.

    Raises:
        ConfigError: Its params cannot be read from JSON.
    """

    def __init__(self, task: TemporalAsyncTask[Any, Any]) -> None:
        self.task = task.name
        self.params_type = _params_type(task)
        self._params = TypeAdapter[Any](self.params_type)
        described, self._result = _result_type(task.result_type)
        result: Any = {"result": (described | None, Field(description="What the task returned; null while it goes on"))}
        self.model: type[RunSummary] = create_model(
            f"{task.name} run",
            __base__=RunSummary,
            __doc__=f"A run of the task {task.name}.",
            **result,
        )

    def read_params(self, body: bytes) -> Any:
        """The params in a body, which may be empty where they may be null.

        Raises:
            RequestValidationError: They do not fit, to the letter of the schema: ``"1"`` is no number.
        """
        try:
            return self._params.validate_json(body or _NULL, strict=True)
        except ValidationError as error:
            found = error.errors(include_url=False, include_context=False, include_input=False)
            raise RequestValidationError([{**one, "loc": ("body", *one["loc"])} for one in found]) from None

    @property
    def params_schema(self) -> dict[str, Any]:
        """The JSON Schema of the task's params."""
        return self._params.json_schema()

    def summary(self, run: TaskResult[Any]) -> RunSummary:
        """A run without its result."""
        values = {field.name: getattr(run, field.name) for field in fields(run)}
        return RunSummary.model_validate({**values, "task": self.task, "result": None})

    def encode(self, run: TaskResult[Any]) -> bytes:
        """A run as JSON, in one line. The same state gives the same bytes in every process."""
        summary = self.summary(run)
        result = _NULL
        if run.status is TaskStatus.COMPLETED and run.error is None:
            try:
                result = self._encode_result(run.result)
            except Exception as error:
                logger.warning("The result of run %r of task %r is not JSON", run.task_id, self.task, exc_info=True)
                summary.error = f"Its result cannot be shown as JSON ({type(error).__name__})."
                summary.error_type = "ResultError"
        return summary.model_dump_json().encode()[:-1] + b',"result":' + result + b"}"

    def _encode_result(self, result: Any) -> bytes:
        if isinstance(result, bytes):
            return json.dumps(base64.b64encode(result).decode()).encode()
        if self._result is not None and result is not None:
            return self._result.dump_json(result, by_alias=True, warnings="error")
        return to_json(result, bytes_mode="base64")


def _params_type(task: TemporalAsyncTask[Any, Any]) -> Any:
    declared: Any = Any if task.params_type is None else task.params_type
    if declared is bytes:
        declared = _BYTES
    try:
        TypeAdapter[Any](declared).json_schema()
    except _NOT_DESCRIBABLE as error:
        raise ConfigError(
            f"The params of task {task.name!r} cannot be read from JSON, so the router cannot take them: {error} "
            f"Use a Pydantic model, a dataclass or JSON types, or leave the task out."
        ) from error
    return declared


def _result_type(declared: Any) -> tuple[Any, TypeAdapter[Any] | None]:
    """What OpenAPI is told of a result, and what makes it JSON."""
    if declared is None:
        return Any, None
    if declared is bytes:
        return _BYTES, None
    adapter = TypeAdapter[Any](declared) if _describable(declared) else None
    return (Any, None) if adapter is None else (declared, adapter)


def _describable(declared: Any) -> bool:
    try:
        TypeAdapter[Any](declared).json_schema(mode="serialization")
    except _NOT_DESCRIBABLE:
        return False  # a type of the application's own converter
    return True
