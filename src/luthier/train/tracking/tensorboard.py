"""A run as TensorBoard's event files, below TENSORBOARD_LOGGING_DIR or in the run's folder. Needs no torch and no TensorFlow."""

import os
import struct
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from luthier.train.tracking.base import Record, RunFacts, Status

PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"


class TensorBoard:
    """Scalars by step, which are float32 here. It has no parameters, artefacts or status: they are texts and a picture."""

    def __init__(self) -> None:
        from tensorboard.compat.proto import event_pb2, summary_pb2, tensor_pb2, types_pb2
        from tensorboard.summary.writer.event_file_writer import EventFileWriter

        self.make_writer, self.events, self.summaries = EventFileWriter, event_pb2, summary_pb2
        self.tensors, self.types = tensor_pb2, types_pb2
        self.writer: Any = None
        self.step = 0

    def begin(self, facts: RunFacts, run_id: str | None) -> str:
        """Start an event file; in a resumed run it takes back what a lost part of it had logged. The id is the folder."""
        usual = os.environ.get("TENSORBOARD_LOGGING_DIR")
        place = run_id or str(Path(usual, facts.name) if usual else Path(facts.folder, "tensorboard"))
        self.writer = self.make_writer(place)
        if facts.step:
            start = self.events.SessionLog(status=self.events.SessionLog.START)
            self.writer.add_event(self.events.Event(wall_time=time.time(), step=facts.step + 1, session_log=start))
        self._text("parameters", facts.parameters, facts.step)
        self._text("facts", facts.facts, facts.step)
        self.writer.flush()
        return place

    def log(self, records: Sequence[Record]) -> None:
        """Write scalars and see that they are in the file."""
        for record in records:
            values = [self.summaries.Summary.Value(tag=key, simple_value=value) for key, value in record.figures.items()]
            self._write(record.step, record.time, values)
            self.step = record.step
        self.writer.flush()

    def artifact(self, path: Path) -> None:
        """Show a PNG; of anything else say where it lies."""
        if not path.is_file() or not (raw := path.read_bytes()).startswith(PNG_SIGNATURE):
            self._text(f"artifacts/{path.name}", {"path": str(path.absolute())}, self.step)
            return
        width, height = struct.unpack(">II", raw[16:24])
        image = self.summaries.Summary.Image(width=width, height=height, colorspace=4, encoded_image_string=raw)
        self._write(self.step, time.time(), [self.summaries.Summary.Value(tag=path.stem, image=image)])

    def finish(self, status: Status) -> None:
        """Write the status and close the file."""
        self._text("status", {"status": status}, self.step)
        self.writer.close()

    def _text(self, tag: str, values: Any, step: int) -> None:
        # A text is a string tensor that the text plugin shows as Markdown.
        table = "| | |\n|---|---|\n" + "".join(f"| {key} | {value} |\n" for key, value in values.items())
        shape = {"dim": [{"size": 1}]}
        tensor = self.tensors.TensorProto(dtype=self.types.DT_STRING, string_val=[table.encode()], tensor_shape=shape)
        plugin = self.summaries.SummaryMetadata.PluginData(plugin_name="text")
        metadata = self.summaries.SummaryMetadata(plugin_data=plugin)
        self._write(step, time.time(), [self.summaries.Summary.Value(tag=f"{tag}/text", metadata=metadata, tensor=tensor)])

    def _write(self, step: int, when: float, values: Any) -> None:
        summary = self.summaries.Summary(value=values)
        self.writer.add_event(self.events.Event(wall_time=when, step=step, summary=summary))
