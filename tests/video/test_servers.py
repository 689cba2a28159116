"""The servers' networks on real frames: what they find, that their scores are best for the reference, gradients."""

from __future__ import annotations

import numpy as np
import pytest
from keras import ops

from keras_efficient import video
from keras_efficient.errors import UnknownName, UnsupportedLayer, WrongArgument
from keras_efficient.video.servers.detection import intersection_over_union, suppressed


def frame(data_dir, name, number):
    frames = video.Video.open(data_dir / "video" / name)
    found = next(one for index, one in enumerate(frames) if index == number)
    return found.to_ndarray(format="rgb24")[None]


def blurred(x, factor=8):
    rows, columns = x.shape[1] // factor * factor, x.shape[2] // factor * factor
    small = x[:, :rows:factor, :columns:factor].repeat(factor, axis=1).repeat(factor, axis=2)
    return np.pad(small, [(0, 0), (0, x.shape[1] - rows), (0, x.shape[2] - columns), (0, 0)], mode="edge")


@pytest.fixture(scope="module")
def crowd(data_dir):
    return frame(data_dir, "people_street_800x450.mp4", 60)


@pytest.fixture(scope="module")
def road(data_dir):
    return frame(data_dir, "dashcam_highway_1280x720.mp4", 0)


def judged(server, x, least):
    """The score falls where the frame is blurred, and its gradient is finite and somewhere."""
    reference = server.reference(x)
    same, worse = (float(ops.convert_to_numpy(server.score(one, reference))[0]) for one in (x, blurred(x)))
    assert same > worse + least
    gains = video.accuracy_gradient(server, x, blurred(x))
    assert gains.shape == (1, -(-x.shape[1] // 16), -(-x.shape[2] // 16))
    assert gains.max() > 5 * np.median(gains)
    return gains[0]


def test_people_are_segmented(data_dir, crowd):
    server = video.onnx_server(data_dir / "models" / "deeplabv3_mnv2_dm05_voc_257.onnx", "segmentation", "deeplab")
    (labels,) = server.predict(crowd)
    assert labels.shape == (257, 257)
    assert (labels == 15).mean() == pytest.approx(0.494, abs=0.05)  # as the files' README has it
    judged(server, crowd, 100)


def test_the_road_is_segmented(data_dir, road):
    path = data_dir / "models" / "road_segmentation_adas_0001.onnx"
    server = video.onnx_server(path, "segmentation", "openvino-road", of_logits=False)
    (labels,) = server.predict(road)
    assert (labels == 1).mean() == pytest.approx(0.25, abs=0.04)
    assert (labels[: len(labels) // 3] == 1).mean() < 0.01
    judged(server, road, 100)


def test_people_have_noses_above_their_shoulders(data_dir, crowd):
    people = video.onnx_server(data_dir / "models" / "yolox_nano.onnx", "detection", "yolox")
    path = data_dir / "models" / "pose_landmark_lite.onnx"
    server = video.onnx_server(path, "keypoints", "mediapipe-pose", people=people)
    (found,) = server.predict(crowd)
    assert found.shape == (8, 39, 3)
    nose, shoulders = found[:, 0, 1], found[:, 11:13, 1].mean(axis=1)
    assert (nose < shoulders).mean() >= 0.75
    assert (found[:, 0, 2] > 0.5).mean() >= 0.5
    gains = judged(server, crowd, 1)
    (boxes,) = people.predict(crowd)
    there = server._squares(crowd)[1]
    assert there.sum() == min(8, int((boxes.scores >= 0.5).sum()))
    assert gains[:2].sum() < 0.2 * gains.sum()


def test_what_is_cut_is_what_is_there(data_dir, crowd):
    people = video.onnx_server(data_dir / "models" / "yolox_nano.onnx", "detection", "yolox")
    plain = video.Preprocessing((64, 64))
    server = video.KeypointServer(lambda x: {}, plain, people, most=2)
    squares = np.array([[[100, 50, 164, 114], [-32, -32, 32, 32]]], np.float32)
    first, second = ops.convert_to_numpy(server._cut(crowd, squares))
    np.testing.assert_allclose(first, crowd[0, 50:114, 100:164], atol=1e-2)
    np.testing.assert_allclose(second[32:, 32:], crowd[0, :32, :32], atol=1e-2)
    assert (second[:31] == 0).all()
    larger = np.array([[[100, 50, 228, 178]] * 2], np.float32)
    halved = ops.convert_to_numpy(server._cut(crowd, larger))[0]
    assert halved.mean() == pytest.approx(crowd[0, 50:178, 100:228].mean(), rel=0.02)


def test_parts_of_scores(data_dir, crowd):
    """They sum to the score; where each person counts alike, more people are heeded."""
    path = data_dir / "models" / "yolox_nano.onnx"
    server = video.onnx_server(path, "detection", "yolox", score="hits")
    reference, worse = server.reference(crowd), blurred(crowd, 4)
    parts, score = (ops.convert_to_numpy(f(worse, reference)) for f in (server.parts, server.score))
    assert parts.shape == (1, 17)
    np.testing.assert_allclose(parts.sum(axis=1), score, rtol=1e-4)
    maps = [video.accuracy_gradient(server, crowd, worse, each=each)[0] for each in (False, True)]
    assert maps[1].sum() == pytest.approx(len(server.predict(crowd)[0]) + 1, abs=1e-3)
    largest = [np.sort(one.ravel())[::-1][:40].sum() / one.sum() for one in maps]
    assert largest[1] < largest[0]
    plain = video.onnx_server(path, "detection", "yolox")
    with pytest.raises(WrongArgument, match='"likelihood" has no parts'):
        video.accuracy_gradient(plain, crowd, worse, each=True)


def test_boxes_that_overlap():
    boxes = np.array([[0, 0, 10, 10], [1, 0, 11, 10], [0, 0, 10, 10], [20, 20, 30, 30]], np.float32)
    assert suppressed(boxes, np.array([0.5, 0.9, 0.4, 0.3]), np.array([0, 0, 1, 0]), 0.45).tolist() == [1, 2, 3]
    np.testing.assert_allclose(intersection_over_union(boxes[0], boxes), [1, 90 / 110, 1, 0], rtol=1e-5)
    assert suppressed(boxes[:0], np.zeros(0), np.zeros(0, int), 0.45).shape == (0,)


@pytest.mark.parametrize("size", [(450, 800), (416, 416), (100, 30)])
def test_letterboxes(size):
    plan = video.PREPROCESSING["yolox"]
    x = np.full((1, *size, 3), 50.0, "float32")
    x[..., 2] = 200.0
    found = ops.convert_to_numpy(plan(x))
    assert found.shape == (1, 3, 416, 416)
    ratio = min(416 / size[0], 416 / size[1])
    rows, columns = round(size[0] * ratio), round(size[1] * ratio)
    np.testing.assert_allclose(found[0, 0, :rows, :columns], 200.0, atol=1e-3)
    np.testing.assert_allclose(found[0, 2, :rows, :columns], 50.0, atol=1e-3)
    assert (found[0, :, rows:] == 114).all()
    assert (found[0, :, :, columns:] == 114).all()


def test_what_is_refused(data_dir):
    path = data_dir / "models" / "yolox_nano.onnx"
    with pytest.raises(UnknownName, match="task: 'detect'"):
        video.onnx_server(path, "detect", "yolox")
    with pytest.raises(UnknownName, match="preprocessing: 'yolo'"):
        video.onnx_server(path, "detection", "yolo")
    with pytest.raises(UnknownName, match="score: 'f1'"):
        video.onnx_server(path, "detection", "yolox", score="f1")
    pose = data_dir / "models" / "pose_landmark_lite.onnx"
    with pytest.raises(WrongArgument, match="has 5 outputs"):
        video.onnx_server(pose, "segmentation", "deeplab")
    segmenter = data_dir / "models" / "deeplabv3_mnv2_dm05_voc_257.onnx"
    with pytest.raises(WrongArgument, match=r"segmenter gives .*, not \(1, 3549, 85\).*\n.* task 'segmentation'"):
        video.onnx_server(path, "segmentation", "yolox")
    with pytest.raises(WrongArgument, match=r"257.onnx: YOLOX gives .* of 257×257, not \(1, 257, 257, 21\)"):
        video.onnx_server(segmenter, "detection", "deeplab")
    with pytest.raises(WrongArgument, match=r"257.onnx: The network takes \(None, 257, 257, 3\)"):
        video.onnx_server(segmenter, "segmentation", "yolox")
    people = video.onnx_server(path, "detection", "yolox")
    with pytest.raises(WrongArgument, match=r"'Identity', are .n, rows, columns, points"):
        video.onnx_server(pose, "keypoints", "mediapipe-pose", people=people, heat="Identity")
    with pytest.raises(WrongArgument, match=r"'Identity_2', are .n, points · 5"):
        video.onnx_server(pose, "keypoints", "mediapipe-pose", people=people, points="Identity_2")


def test_a_graph_that_is_understood_in_another_way_is_refused(tmp_path, monkeypatch):
    import onnx
    from onnx import TensorProto, helper

    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, "h", "w", 3]) for name in "xy"]
    graph = helper.make_graph([helper.make_node("Softmax", ["x"], ["y"], axis=2)], "graph", values[:1], values[1:])
    path = tmp_path / "a.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8), path)
    plain = video.Preprocessing((8, 12), scale=1 / 255)
    assert video.onnx_server(path, "segmentation", plain).predict(np.zeros((1, 8, 12, 3)))[0].shape == (8, 12)
    monkeypatch.setattr(video.OnnxGraph, "__call__", lambda self, x, outputs: {"y": ops.softmax(x, axis=-1)})
    with pytest.raises(UnsupportedLayer, match=r"a.onnx: y.*not the one of ONNX Runtime"):
        video.onnx_server(path, "segmentation", plain)
