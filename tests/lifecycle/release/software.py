"""Run by the build of the software, with ``self``, ``base`` and ``here`` of software.cfg."""
# ruff: noqa: F821, SIM115 - names of software.cfg

# "build", beside the profile, says how this build behaves: "fail TEXT", or in a process of its own "sleep SECONDS", "cat FIFO"
said = (
    open(os.path.join(base, "build")).read().split(None, 1)
    if os.path.exists(os.path.join(base, "build"))
    else []
)
if said and said[0] in ("sleep", "cat"):
    import subprocess

    subprocess.check_call([f"/bin/{said[0]}", said[1].strip()])
if said and said[0] == "fail":
    import zc.buildout

    raise zc.buildout.UserError(said[1].strip())

with open(os.path.join(here, "instance.cfg"), "w") as profile:
    profile.write(
        f"""[buildout]
parts = service
eggs-directory = {here}/eggs
develop-eggs-directory = {here}/develop-eggs

[service]
recipe = slapos.recipe.build
init =
  exec(compile(open('{base}/instance.py').read(), 'instance.py', 'exec'))
"""
    )
