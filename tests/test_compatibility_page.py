"""docs/compatibility.md lists public incidents, each once, with its outcome and a test that tries it."""

from __future__ import annotations

import re

from tests.conftest import ROOT

TESTS = {
    "node-fetch #1624": "test_addresses.py::test_both_families_are_served",
    "uvicorn #2945": "test_addresses.py::test_both_families_are_served",
    "KServe #5446": "test_keep_alive.py::test_a_pooled_client_loses_no_request",
    "Phalanx #5103": "test_keep_alive.py::test_the_service_outlives_the_proxies",
    "Conbench #1156": "test_keep_alive.py::test_an_idle_connection_is_closed_after_the_limit",
    "OpenJarvis #758": "test_cors.py::test_a_preflight_request_needs_no_key",
    "FastAPI #2693": "gateway/test_cors.py::test_results_and_rejections_can_be_read",
    "FastAPI #1190": "test_parameters.py::test_an_unknown_parameter_is_rejected_by_name",
    "axios #2927": "app/http/test_regressions.py::test_general_clients_get_the_picture",
    "Starlette #644": "app/http/test_regressions.py::test_gzip_is_decoded_within_the_limit",
    "curl #3859": "app/http/test_regressions.py::test_damage_by_text_modes_gets_the_hint_that_mends_it",
    "data-collection-ios #184": "app/http/test_regressions.py::test_another_format_is_named",
    "Brave #10000": "app/images/test_png.py::test_grey_images_are_accepted",
    "Retrofit #985": "app/http/test_regressions.py::test_the_transfer_encoding_of_java_clients_is_accepted",
    "ASP.NET #769": "app/http/test_form_properties.py::test_a_valid_form_has_one_answer",
    "multipart #28": "app/http/test_form_properties.py::test_a_valid_form_has_one_answer",
    "python-multipart #260": "app/http/test_regressions.py::test_forms_of_the_rfcs_are_read_on_both_routes",
    "httpx #3221": "client/test_environment.py::test_ipv6_addresses_and_ranges_in_no_proxy",
    "Basic Memory #1541": "client/test_environment.py::test_the_entries_of_no_proxy",
    "aider-composer #49": "client/test_environment.py::test_authorities_that_cannot_be_read_are_named",
    "feature-store-api #1145": "client/test_environment.py::test_white_space_around_a_key_is_removed",
    "Spoolman #961": "test_start.py::test_variables_of_kubernetes_services_are_ignored",
    "PowerShell #8636": "gateway/test_key_files.py::test_an_invalid_file_is_rejected_by_both_in_the_same_words",
    "caveman #1008": "test_store_file.py::test_a_replaced_file_is_read",
    "cudnn-training #13": "test_idx_files.py::test_names_with_a_dot_are_read",
    "python-mnist #19": "test_idx_files.py::test_every_layout_is_read",
    "nn_robust_attacks #51": "test_idx_files.py::test_a_web_page_is_named",
}
"""The test that sends or gives what each incident is about."""
ROW = re.compile(r"^\| \[([^]]+ #\d+)\]\((https://[^)]+)\) \| (.+) \| (.+) \|$", re.MULTILINE)


def test_the_page_lists_twenty_incidents() -> None:
    """Each row has a link, the request, and the service's behaviour; no link occurs twice."""
    page = (ROOT / "docs" / "compatibility.md").read_text()
    rows = ROW.findall(page)
    assert len(rows) >= 20
    assert len({link for _, link, _, _ in rows}) == len(rows)
    assert len(rows) == page.count("| [")


def test_every_incident_is_tried_by_a_test() -> None:
    """Each row has a test that exists."""
    page = (ROOT / "docs" / "compatibility.md").read_text()
    assert {name for name, _, _, _ in ROW.findall(page)} == set(TESTS)
    for test in TESTS.values():
        file, _, name = test.partition("::")
        assert re.search(rf"\bdef {name}\(", (ROOT / "tests" / file).read_text()), test
