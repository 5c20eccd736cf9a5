"""Verify: every stage on 200 tiles and one GPU; writes gpu.json with the device, speeds, losses, memory and scores.

example: python jobs/verify_gpu.py --output gpu.json
"""

from urbanclip_ray.command_line import run_verification

if __name__ == "__main__":
    run_verification(__doc__)
