"""The page of a check: what a dataset says of itself is text on it, never HTML."""

from manipi.data.review.report import CheckReport, EpisodeFacts, error, warning, write_check_page

HOSTILE = "<img src=x onerror=alert(1)> & \"'"


def test_texts_of_a_dataset_are_escaped(tmp_path):
    facts = EpisodeFacts(index=0, length=3, task=HOSTILE, idle=0.0, jerk=0.0, motion=(0.5, 1.0))
    report = CheckReport(
        root=f"/data/{HOSTILE}",
        num_episodes=1,
        num_frames=3,
        fps=10.0,
        cameras=(HOSTILE,),
        depth=(HOSTILE,),
        findings=(error("values", HOSTILE, HOSTILE, (0,), where=HOSTILE), warning("language", HOSTILE, HOSTILE)),
        episodes=(facts,),
        tasks={HOSTILE: 1},
    )
    write_check_page(tmp_path / "check.html", report)
    html = (tmp_path / "check.html").read_text()
    assert "<img" not in html
    assert html.count("&lt;img src=x onerror=alert(1)&gt; &amp; &#34;&#39;") == 12
    assert "1 episode, 3 frames at 10 per second" in html


def test_nothing_is_wrong(tmp_path):
    write_check_page(tmp_path / "check.html", CheckReport(root="/data/sound"))
    html = (tmp_path / "check.html").read_text()
    assert "<p>Nothing.</p>" in html
    assert "warnings, no errors" in html
    assert "The dataset cannot be opened." in html
