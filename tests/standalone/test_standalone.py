"""slapos.core's own tests of its StandaloneSlapOS, unmodified, with our command in the place of ``slapos node``.

The table of docs/design/node-verbs.md is this one: nothing of theirs fails.
"""

import sys
from pathlib import Path

import pytest

_SETUP = """
    test_default_commands_include_software test_format test_format_idempotent_permissions test_format_ipv6_big_range
    test_format_ipv6_no_range test_format_ipv6_slash_128_range test_format_ipv6_small_range
    test_format_ipv6_very_small_range test_instance_only_commands test_instance_only_creates_no_software_root
    test_instance_only_format test_partition_forward test_reformat_different_base_name test_reformat_less_chmod_files
    test_reformat_less_partitions test_reformat_refuse_deleting_running_partition test_slapos_node_format
    test_two_instance_from_same_directory
""".split()
# with a release of plone.recipe.command: slapos.core takes it from PyPI, we from the wheels that our environment has
_BUILDS = """
    TestSlapOSStandaloneSoftware.test_install_software TestSlapOSStandaloneSoftware.test_install_software_failure
    TestSlapOSStandaloneSoftware.test_install_software_failure_log_with_ansi_codes
    TestSlapOSStandaloneInstance.test_request_instance TestSlapOSStandaloneLongSoftwareError.test
""".split()
ALL = {f"TestSlapOSStandaloneSetup.{name}" for name in _SETUP} | {
    *_BUILDS,
    "TestSlapOSStandaloneLogFile.test_log_files",
}
_ESSENTIAL = (
    "TestSlapOSStandaloneInstance.test_request_instance",
    "TestSlapOSStandaloneSetup.test_format_ipv6_big_range",
    "TestSlapOSStandaloneSetup.test_reformat_less_chmod_files",
)


@pytest.fixture(autouse=True)
def recipe():
    wheels = Path(sys.prefix) / "share" / "wheels"
    assert list(wheels.glob("plone_recipe_command-1.1-*.whl")), (
        f"{wheels} is older than requirements/builds.txt"
    )


def _failures(found):
    return {name: (outcome, text[-3000:]) for name, (outcome, _, text) in found.items() if outcome != "pass"}


def test_their_essential_tests_pass_on_our_command(standalone):
    found = standalone.theirs(*_ESSENTIAL)
    assert found.keys() == set(_ESSENTIAL)
    assert not _failures(found)


@pytest.mark.full
def test_all_of_their_tests_pass_on_our_command(standalone):
    found = standalone.theirs()
    assert found.keys() == ALL
    assert not _failures(found)
