"""The Grafana dashboard and the scrape config: they ask for what there is, and can be loaded."""

from __future__ import annotations

import itertools
import shutil
import subprocess

import pytest
import yaml
from prometheus import CONFIG, WITHOUT, metric_names, panels, queries, read_dashboard

from urbanclip_ray.metrics import METRICS

OURS = {metric.exported_name: metric for metric in METRICS}
RAYS = {  # Ray 2.60's own
    *("ray_object_store_used_memory", "ray_object_store_available_memory", "ray_spill_manager_objects_bytes"),
    *("ray_cluster_active_nodes", "ray_node_cpu_utilization", "ray_node_mem_used", "ray_node_mem_total"),
    *("ray_node_gpus_utilization", "ray_node_disk_utilization_percentage", "ray_tasks", "ray_actors"),
    *("ray_node_network_receive_speed", "ray_node_network_send_speed"),
}


@pytest.mark.parametrize("query", queries(), ids=str)
def test_a_query_asks_for_metrics_that_there_are_and_filters_ours_by_run(query):
    names = metric_names(query.expression)
    assert names
    assert names <= OURS.keys() | RAYS
    for name in names & OURS.keys():
        assert f'{name}{{run=~"$run"}}' in query.expression
        if OURS[name].kind == "gauge":
            assert "rate(" not in query.expression


def test_every_metric_of_ours_is_shown():
    assert set().union(*(metric_names(query.expression) for query in queries())) >= OURS.keys()


def test_panels_have_numbers_of_their_own_and_lie_beside_each_other():
    everything = read_dashboard()["panels"]
    assert len({panel["id"] for panel in everything}) == len(everything)
    places = [panel["gridPos"] for panel in everything]
    assert all(place["x"] >= 0 and place["x"] + place["w"] <= 24 and place["h"] > 0 for place in places)
    for one, other in itertools.combinations(places, 2):
        apart_x = one["x"] + one["w"] <= other["x"] or other["x"] + other["w"] <= one["x"]
        apart_y = one["y"] + one["h"] <= other["y"] or other["y"] + other["h"] <= one["y"]
        assert apart_x or apart_y, (one, other)


def test_the_datasource_is_a_variable_and_every_panel_says_what_it_shows():
    dashboard = read_dashboard()
    variables = {variable["name"]: variable for variable in dashboard["templating"]["list"]}
    assert variables["datasource"]["type"] == "datasource"
    assert set(variables) == {"datasource", "run"}
    for panel in panels():
        assert panel["datasource"] == {"type": "prometheus", "uid": "${datasource}"}
        assert panel["description"].endswith(".")
        assert panel["fieldConfig"]["defaults"]["unit"]
        assert len({target["refId"] for target in panel["targets"]}) == len(panel["targets"])


def test_prometheus_reads_the_nodes_from_ray_s_own_list():
    (job,) = yaml.safe_load(CONFIG.read_text())["scrape_configs"]
    assert job["file_sd_configs"][0]["files"] == ["/tmp/ray/prom_metrics_service_discovery.json"]


def test_promtool_accepts_the_config():
    promtool = shutil.which("promtool")
    if promtool is None:
        pytest.skip(WITHOUT.format(program="promtool"))
    checked = subprocess.run([promtool, "check", "config", str(CONFIG)], capture_output=True, text=True, timeout=60)
    assert checked.returncode == 0, checked.stdout + checked.stderr
