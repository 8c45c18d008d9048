"""What the reference model does with video: edit it, extend it, steer it. ``stattn.video.edit`` is the way in."""
