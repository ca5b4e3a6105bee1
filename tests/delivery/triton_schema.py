"""The part of Triton's ``model_config.proto`` that is written here, for protobuf's own parser.

Names, numbers and types as NVIDIA's file documents them; a test compares them with tritonclient's
where that is installed (it wants an older protobuf than this project's constraints).
"""

from __future__ import annotations

from typing import Any

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory, text_format

STRING, BOOL, INT32, INT64 = 9, 8, 5, 3
PACKAGE = "inference"
ENUMS: dict[str, dict[str, int]] = {
    "DataType": {
        **{"TYPE_INVALID": 0, "TYPE_BOOL": 1, "TYPE_UINT8": 2, "TYPE_INT32": 8, "TYPE_INT64": 9},
        **{"TYPE_FP16": 10, "TYPE_FP32": 11, "TYPE_STRING": 13},
    },
    "ModelInstanceGroup.Kind": {"KIND_AUTO": 0, "KIND_GPU": 1, "KIND_CPU": 2, "KIND_MODEL": 3},
}
# Message -> field -> number, type (of protobuf, or a name), whether it repeats.
MESSAGES: dict[str, dict[str, tuple[int, Any, bool]]] = {
    "ModelConfig": {
        "name": (1, STRING, False),
        "platform": (2, STRING, False),
        "backend": (17, STRING, False),
        "max_batch_size": (4, INT32, False),
        "input": (5, "ModelInput", True),
        "output": (6, "ModelOutput", True),
        "optimization": (12, "ModelOptimizationPolicy", False),
        "dynamic_batching": (11, "ModelDynamicBatching", False),
        "ensemble_scheduling": (15, "ModelEnsembling", False),
        "instance_group": (7, "ModelInstanceGroup", True),
    },
    "ModelInput": {
        "name": (1, STRING, False),
        "data_type": (2, "DataType", False),
        "dims": (4, INT64, True),
        "reshape": (5, "ModelTensorReshape", False),
        "optional": (8, BOOL, False),
    },
    "ModelOutput": {
        "name": (1, STRING, False),
        "data_type": (2, "DataType", False),
        "dims": (3, INT64, True),
        "reshape": (5, "ModelTensorReshape", False),
    },
    "ModelTensorReshape": {"shape": (1, INT64, True)},
    "ModelInstanceGroup": {
        "kind": (4, "ModelInstanceGroup.Kind", False),
        "count": (2, INT32, False),
    },
    "ModelDynamicBatching": {"preferred_batch_size": (1, INT32, True)},
    "ModelOptimizationPolicy": {"graph": (1, "ModelOptimizationPolicy.Graph", False)},
    "ModelOptimizationPolicy.Graph": {"level": (1, INT32, False)},
    "ModelEnsembling": {"step": (1, "ModelEnsembling.Step", True)},
    "ModelEnsembling.Step": {
        "model_name": (1, STRING, False),
        "model_version": (2, INT64, False),
        "input_map": (3, "ModelEnsembling.Step.InputMapEntry", True),
        "output_map": (4, "ModelEnsembling.Step.OutputMapEntry", True),
    },
    **{
        f"ModelEnsembling.Step.{way}MapEntry": {
            "key": (1, STRING, False),
            "value": (2, STRING, False),
        }
        for way in ("Input", "Output")
    },
}


def _file() -> descriptor_pb2.FileDescriptorProto:
    file = descriptor_pb2.FileDescriptorProto(
        name="written_here.proto", package=PACKAGE, syntax="proto3"
    )
    made: dict[str, Any] = {"": file}
    for name, fields in MESSAGES.items():
        outer, _, own = name.rpartition(".")
        kept = made[outer]
        made[name] = (kept.nested_type if outer else kept.message_type).add(name=own)
        made[name].options.map_entry = own.endswith("MapEntry")
        for field, (number, kind, repeats) in fields.items():
            one = made[name].field.add(name=field, number=number, label=3 if repeats else 1)
            if isinstance(kind, str):
                one.type, one.type_name = (14 if kind in ENUMS else 11), f".{PACKAGE}.{kind}"
            else:
                one.type = kind
    for name, values in ENUMS.items():
        outer, _, own = name.rpartition(".")
        enum = made[outer].enum_type.add(name=own)
        for value, number in values.items():
            enum.value.add(name=value, number=number)
    return file


def parsed(text: str) -> Any:
    """A config.pbtxt as protobuf reads it. Raises ParseError for what the schema has not."""
    pool = descriptor_pool.DescriptorPool()
    pool.Add(_file())
    kind = message_factory.GetMessageClass(pool.FindMessageTypeByName(f"{PACKAGE}.ModelConfig"))
    return text_format.Parse(text, kind())
