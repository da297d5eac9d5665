"""Validation of what ``--json`` prints against the schemas that ship in the package."""

import json
from importlib import resources

from jsonschema import Draft202012Validator


def schema(verb):
    text = resources.files("partitiond").joinpath("schemas", f"{verb}.json").read_text("utf-8")
    return json.loads(text)


def validate(value):
    """Check one object against the schema that it names; return the object."""
    prefix, verb, version = value["schema"].split("/")
    assert (prefix, version) == ("partitiond", "1")
    found = schema(verb)
    assert found["$id"] == value["schema"]
    errors = [
        f"{error.json_path}: {error.message}" for error in Draft202012Validator(found).iter_errors(value)
    ]
    assert not errors, errors
    return value


def parsed(done):
    """The one object on the standard output of a finished program, validated."""
    return validate(json.loads(done.stdout))
