"""The scene as MJCF text, built from primitives: no asset files. Link frames are those of a Franka Panda arm."""

from __future__ import annotations

BLOCK = 0.025  # half the edge of a block
PLATE = 0.06  # radius of a plate
TABLE = (0.74, 0.71, 0.66)  # its colour
# The camera looks from the far side of the table towards the robot, so that the arm hides little:
# at 64 x 64 pixels it covers half a metre of table, and a block is 7 pixels wide.
FRONT = "<camera name='front' pos='.87 0 .784' xyaxes='0 1 0 -.819 0 .574' fovy='30'/>"
WRIST = "<camera name='wrist' pos='.09 0 .045' xyaxes='0 1 0 .9 0 .43' fovy='75'/>"
LIMITS = ((0.10, -0.36, 0.03), (0.62, 0.36, 0.45))  # box the end effector stays in

# (name, position, orientation, mass, inertia, joint range, visual geoms). Joints turn about local z.
_LINKS = (
    ("1", "0 0 .333", "1 0 0 0", 3.0, 0.05, (-2.9, 2.9),
     "<geom class='v' type='capsule' size='.06' fromto='0 0 -.2 0 0 0'/>"),
    ("2", "0 0 0", "1 -1 0 0", 3.0, 0.05, (-1.76, 1.76),
     "<geom class='v' type='capsule' size='.062' fromto='0 0 -.06 0 0 .06' rgba='.3 .3 .33 1'/>"
     "<geom class='v' type='capsule' size='.055' fromto='0 0 0 0 -.2 0'/>"),
    ("3", "0 -.316 0", "1 1 0 0", 2.0, 0.03, (-2.9, 2.9),
     "<geom class='v' type='capsule' size='.055' fromto='0 0 -.1 .08 0 0'/>"),
    ("4", ".0825 0 0", "1 1 0 0", 2.0, 0.03, (-3.07, -0.07),
     "<geom class='v' type='capsule' size='.058' fromto='0 0 -.05 0 0 .05' rgba='.3 .3 .33 1'/>"
     "<geom class='v' type='capsule' size='.05' fromto='0 0 0 -.08 .12 0'/>"),
    ("5", "-.0825 .384 0", "1 -1 0 0", 2.0, 0.03, (-2.9, 2.9),
     "<geom class='v' type='capsule' size='.05' fromto='0 0 -.26 0 0 -.02'/>"),
    ("6", "0 0 0", "1 1 0 0", 1.5, 0.02, (-0.02, 3.75),
     "<geom class='v' type='capsule' size='.05' fromto='0 0 -.04 0 0 .04' rgba='.3 .3 .33 1'/>"
     "<geom class='v' type='capsule' size='.045' fromto='0 0 0 .088 0 0'/>"),
    ("7", ".088 0 0", "1 1 0 0", 0.7, 0.01, (-2.9, 2.9),
     "<geom class='v' type='cylinder' size='.045 .04' pos='0 0 .06'/>"),
)  # fmt: skip
_GAINS = ((4500, 450), (4500, 450), (3500, 350), (3500, 350), (2000, 200), (2000, 200), (2000, 200))


def _finger(name: str, axis: int) -> str:
    return (
        f"<body name='finger_{name}' pos='0 0 .0584' gravcomp='1'>"
        "<inertial mass='.05' pos='0 0 0' diaginertia='1e-4 1e-4 1e-4'/>"
        f"<joint name='{name}' type='slide' axis='0 {axis} 0' range='0 .04' damping='20' armature='.5'/>"
        f"<geom class='pad' size='.011 .006 .024' pos='0 {axis * 0.006} .03'/></body>"
    )


def _arm() -> str:
    hand = (
        "<body name='hand' pos='0 0 .107' quat='.9238795 0 0 -.3826834' gravcomp='1'>"
        "<inertial mass='.7' pos='0 0 .03' diaginertia='.002 .002 .002'/>"
        "<geom class='v' type='box' size='.03 .1 .03' pos='0 0 .03'/>"
        f"<site name='eef' pos='0 0 .1034' size='.005' rgba='1 0 0 0'/>{WRIST}"
        f"{_finger('left', 1)}{_finger('right', -1)}</body>"
    )
    body = hand
    for name, pos, quat, mass, inertia, (low, high), geoms in reversed(_LINKS):
        body = (
            f"<body name='link{name}' pos='{pos}' quat='{quat}' gravcomp='1'>"
            f"<inertial mass='{mass}' pos='0 0 0' diaginertia='{inertia} {inertia} {inertia}'/>"
            f"<joint name='j{name}' range='{low} {high}'/>{geoms}{body}</body>"
        )
    base = "<geom type='cylinder' size='.09 .07' pos='0 0 .07' rgba='.92 .92 .92 1'/>"
    return f"<body name='link0' pos='-0.2 0 0'>{base}{body}</body>"


def mjcf(n_blocks: int, n_plates: int) -> str:
    """The MJCF of a scene. Blocks `block{i}` have free joints; plates `plate{i}` are markers without contact."""
    blocks = "".join(
        f"<body name='block{i}' pos='.4 {-0.3 + 0.2 * i} {BLOCK}'><freejoint name='block{i}'/>"
        f"<geom name='block{i}' type='box' size='{BLOCK} {BLOCK} {BLOCK}' mass='.05' "
        "friction='1.2 .01 .001' condim='4'/></body>"
        for i in range(n_blocks)
    )
    plates = "".join(
        f"<body name='plate{i}' mocap='true' pos='.5 {0.2 * i} .002'>"
        f"<geom name='plate{i}' type='cylinder' size='{PLATE} .003' contype='0' conaffinity='0'/></body>"
        for i in range(n_plates)
    )
    motors = "".join(
        f"<general joint='j{i + 1}' biastype='affine' gainprm='{k}' biasprm='0 -{k} -{d}'/>"
        for i, (k, d) in enumerate(_GAINS)
    )
    grip = "".join(f"<position joint='{f}' kp='350' forcerange='-30 30' ctrlrange='0 .04'/>" for f in ("left", "right"))
    # timestep .002: at .004 this friction cone throws blocks out of the gripper. Shadows and multisampling are off:
    # they cost ten times the rest of a frame in software rendering.
    return f"""<mujoco model='tabletop'>
<compiler angle='radian' autolimits='true'/>
<option timestep='.002' integrator='implicitfast' cone='elliptic' impratio='10'/>
<visual><global offwidth='640' offheight='640'/><quality shadowsize='0' offsamples='0'/>
<headlight ambient='.5 .5 .5' diffuse='.45 .45 .45' specular='.05 .05 .05'/></visual>
<default><joint type='hinge' axis='0 0 1' armature='.1' damping='1'/>
<default class='v'><geom contype='0' conaffinity='0' rgba='.93 .93 .93 1' group='2'/></default>
<default class='pad'><geom type='box' friction='1.5 .02 .001' condim='4' rgba='.2 .2 .2 1'
 solref='.01 1'/></default></default>
<asset><texture name='sky' type='skybox' builtin='gradient' rgb1='.75 .82 .9' rgb2='.95 .95 .95'
 width='64' height='64'/></asset>
<worldbody><light pos='.3 -.5 1.6' dir='0 .3 -1' castshadow='false' diffuse='.35 .35 .35'/>
<geom name='table' type='box' size='.6 .6 .4' pos='.3 0 -.4' rgba='{TABLE[0]} {TABLE[1]} {TABLE[2]} 1'/>
{FRONT}{_arm()}{plates}{blocks}</worldbody>
<actuator>{motors}{grip}</actuator></mujoco>"""
